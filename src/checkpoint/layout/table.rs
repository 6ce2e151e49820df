//! The layouts that can be read and written, as data; see [`super::names`].

use super::names::{Experts, Layout};
use crate::model::Role;

const QWEN: &[(Role, &str)] =
    &[(Role::Gate, "gate_proj"), (Role::Up, "up_proj"), (Role::Down, "down_proj")];
const MIXTRAL: &[(Role, &str)] = &[(Role::Gate, "w1"), (Role::Up, "w3"), (Role::Down, "w2")];
const SWITCH: &[(Role, &str)] = &[(Role::Up, "wi"), (Role::Down, "wo")];
const NLLB: &[(Role, &str)] = &[(Role::Up, "fc1"), (Role::Down, "fc2")];
const DBRX: &[(Role, &str)] = &[(Role::Gate, "w1"), (Role::Up, "v1"), (Role::Down, "w2")];

const MLP_ROUTERS: &[&str] = &["mlp.gate.weight", "mlp.gate.wg.weight", "mlp.router.gate.weight"];
const MLP_CORRECTIONS: &[&str] = &[
    "mlp.gate.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction_bias",
    "mlp.expert_bias",
];

/// Every layout that can be read and written.
pub(crate) const LAYOUTS: &[Layout] = &[
    Layout {
        name: "qwen",
        experts: Experts::Each { before: "mlp.experts.", projections: QWEN },
        router: MLP_ROUTERS,
        router_bias: &[],
        correction: MLP_CORRECTIONS,
    },
    Layout {
        name: "jamba",
        experts: Experts::Each { before: "feed_forward.experts.", projections: QWEN },
        router: &["feed_forward.router.weight"],
        router_bias: &[],
        correction: &[],
    },
    Layout {
        name: "mixtral",
        experts: Experts::Each { before: "block_sparse_moe.experts.", projections: MIXTRAL },
        router: &["block_sparse_moe.gate.weight"],
        router_bias: &[],
        correction: &[
            "block_sparse_moe.e_score_correction_bias",
            "block_sparse_moe.gate.e_score_correction_bias",
        ],
    },
    Layout {
        name: "lfm2",
        experts: Experts::Each { before: "feed_forward.experts.", projections: MIXTRAL },
        router: &["feed_forward.gate.weight"],
        router_bias: &[],
        correction: &["feed_forward.expert_bias"],
    },
    Layout {
        name: "gpt_oss",
        experts: Experts::Interleaved {
            gate_up: "mlp.experts.gate_up_proj",
            down: "mlp.experts.down_proj",
        },
        router: &["mlp.router.weight"],
        router_bias: &["mlp.router.bias"],
        correction: &[],
    },
    Layout {
        name: "fused",
        experts: Experts::Fused {
            gate_up: "mlp.experts.gate_up_proj",
            down: "mlp.experts.down_proj",
        },
        router: MLP_ROUTERS,
        router_bias: &[],
        correction: MLP_CORRECTIONS,
    },
    Layout {
        name: "llama4",
        experts: Experts::Fused {
            gate_up: "feed_forward.experts.gate_up_proj",
            down: "feed_forward.experts.down_proj",
        },
        router: &["feed_forward.router.weight"],
        router_bias: &[],
        correction: &[],
    },
    Layout {
        name: "granite",
        experts: Experts::Fused {
            gate_up: "block_sparse_moe.input_linear.weight",
            down: "block_sparse_moe.output_linear.weight",
        },
        router: &["block_sparse_moe.router.layer.weight"],
        router_bias: &[],
        correction: &[],
    },
    Layout {
        name: "switch",
        experts: Experts::Each { before: "mlp.experts.expert_", projections: SWITCH },
        router: &["mlp.router.classifier.weight"],
        router_bias: &["mlp.router.classifier.bias"],
        correction: &[],
    },
    Layout {
        name: "nllb",
        experts: Experts::Each { before: "ffn.experts.expert_", projections: NLLB },
        router: &["ffn.router.classifier.weight"],
        router_bias: &["ffn.router.classifier.bias"],
        correction: &[],
    },
    Layout {
        name: "dbrx",
        experts: Experts::Flat { before: "ffn.experts.mlp.", projections: DBRX },
        router: &["ffn.router.layer.weight"],
        router_bias: &[],
        correction: &[],
    },
];
