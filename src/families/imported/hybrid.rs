//! Families with state spaces or convolutions, which the forward pass does not know.

use crate::families::layout::{GRANITE, JAMBA, LFM2};
use crate::families::routing::{Renormalise, Routing};
use crate::families::{Family, Forward, Runtimes};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["jamba"],
        layouts: &[&JAMBA],
        routing: Routing::softmax(Renormalise::Never),
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["granitemoehybrid"],
        layouts: &[&GRANITE],
        routing: Routing::SOFTMAX_OF_TOP_K,
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["lfm2_moe"],
        layouts: &[&LFM2],
        routing: Routing { groups: None, ..Routing::deepseek_v3(1.0, (1, 1)) },
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
];
