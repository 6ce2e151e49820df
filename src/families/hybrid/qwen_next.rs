//! Qwen3-Next, Qwen3.5-MoE and Qwen3.6-MoE: three layers of gated delta net to one of attention.

use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise, Routing};
use crate::families::{Family, Forward, Runtimes};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["qwen3_next"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, true)),
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        layouts: &[&FUSED, &QWEN],
        routing: Routing::softmax(Renormalise::Always),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
];
