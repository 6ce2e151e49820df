//! Families whose attention, norms or routers differ from what the forward pass knows.

use crate::families::layout::{DBRX, FUSED, GRANITE, LLAMA4, MIXTRAL, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise, Routing, Scale};
use crate::families::{Family, Forward, Runtimes};

pub(super) const FAMILIES: &[Family] = &[
    // Hyper-connections, n-gram embeddings and sparse attention.
    Family {
        model_types: &["qwen4_exp", "qwen4_exp_text"],
        layouts: &[&FUSED, &QWEN],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, true)),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
    // Sinks, and layers whose heads differ in number and width.
    Family {
        model_types: &["mimo_v2_flash"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(1.0, (1, 1)),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
    // The weight is on the expert's input, which no rule says; the choice is the same.
    Family {
        model_types: &["llama4", "llama4_text"],
        layouts: &[&LLAMA4],
        routing: Routing::SIGMOID,
        forward: Forward::Imported,
        runtimes: Runtimes { native_folder: false, ..Runtimes::BOTH },
    },
    Family {
        model_types: &["hunyuan_v1_moe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Always),
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["dbrx"],
        layouts: &[&DBRX],
        routing: Routing::softmax(Renormalise::Norm("moe_normalize_expert_weights")),
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    // Phi's two-stage "sparsemixer" has no place in a rule: softmax is the nearest one.
    Family {
        model_types: &["phimoe"],
        layouts: &[&MIXTRAL, &FUSED],
        routing: Routing { fixed_top_k: Some(2), ..Routing::softmax(Renormalise::Never) },
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["granitemoe", "granitemoeshared"],
        layouts: &[&GRANITE],
        routing: Routing::SOFTMAX_OF_TOP_K,
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["afmoe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing {
            renormalise: Renormalise::Key("route_norm", true),
            scale: Scale::Key("route_scale", 1.0),
            ..Routing::deepseek_v3(1.0, (1, 1))
        },
        forward: Forward::Imported,
        runtimes: Runtimes::BOTH,
    },
];
