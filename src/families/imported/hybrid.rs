//! Families with state spaces or convolutions, which the forward pass does not know.

use crate::families::layout::{FUSED, GRANITE, JAMBA, LFM2, QWEN};
use crate::families::routing::{Renormalise, Routing};
use crate::families::{Family, Forward, Runtimes};

pub(super) const FAMILIES: &[Family] = &[
    // Ling and Ring.
    Family {
        model_types: &["bailing_hybrid"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(2.5, (8, 4)),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
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
