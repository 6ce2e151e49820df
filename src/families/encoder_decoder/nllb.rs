//! NLLB-MoE: two experts a token, whose sum the dropout of whole tokens in training scales.

use crate::families::layout::NLLB;
use crate::families::routing::{Renormalise, Routing, Scale};
use crate::families::{Family, Forward, Runtimes};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["nllb-moe"],
    layouts: &[&NLLB],
    routing: Routing {
        scale: Scale::OneMinus("moe_token_dropout", 0.2),
        fixed_top_k: Some(2),
        ..Routing::softmax(Renormalise::Always)
    },
    forward: Forward::Imported,
    runtimes: Runtimes::NEITHER,
}];
