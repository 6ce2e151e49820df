//! How families name and shape the tensors of experts and routers.
//!
//! A layout is recognised from the names of the expert tensors alone: wrappers change prefixes, and
//! one model type may come in more than one layout. Names are relative to the block
//! (`model.layers.3.`, `encoder.block.1.layer.1.`). A family with names of its own states its
//! layout in its table.

use crate::model::Role;

/// One way to name and shape the tensors of an MoE block.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) experts: Experts,
    /// Names of the `(N, d)` router weight.
    pub(crate) router: &'static [&'static str],
    /// Names of the `(N)` bias of the logits.
    pub(crate) router_bias: &'static [&'static str],
    /// Names of the `(N)` or `(1, N)` correction of the choice.
    pub(crate) correction: &'static [&'static str],
}

/// Where the experts are.
#[derive(Debug)]
pub(crate) enum Experts {
    /// `{before}{i}.{projection}.{weight|bias}`, weights `(out, in)`.
    Each { before: &'static str, projections: &'static [(Role, &'static str)] },
    /// `(N, 2f, d)`, gate rows first, and `(N, d, f)`; or both transposed, `(N, d, 2f)`, gate
    /// columns first, and `(N, f, d)`, which no shapes leave open.
    Fused { gate_up: &'static str, down: &'static str },
    /// `(N, d, 2f)`, gate and up columns in turn, and `(N, f, d)`, with `{name}_bias`; or
    /// `{name}_blocks` in MXFP4, which are not transposed: `(N, 2f, d)` and `(N, d, f)`.
    Interleaved { gate_up: &'static str, down: &'static str },
    /// Tensors `(N f, d)` without ending, one under the other the experts' gate, up and transposed
    /// down matrices.
    Flat { before: &'static str, projections: &'static [(Role, &'static str)] },
}

impl Layout {
    /// Whether gate and up take turns, which names alone do not say: such a block has a router of
    /// its own kind too.
    pub(crate) fn is_interleaved(&self) -> bool {
        matches!(self.experts, Experts::Interleaved { .. })
    }

    /// Whether experts have a gate.
    pub(crate) fn is_gated(&self) -> bool {
        match &self.experts {
            Experts::Each { projections, .. } | Experts::Flat { projections, .. } => {
                projections.iter().any(|(r, _)| *r == Role::Gate)
            }
            Experts::Fused { .. } | Experts::Interleaved { .. } => true,
        }
    }
}

pub(crate) const GATE_UP_DOWN: &[(Role, &str)] =
    &[(Role::Gate, "gate_proj"), (Role::Up, "up_proj"), (Role::Down, "down_proj")];
const W1_W3_W2: &[(Role, &str)] = &[(Role::Gate, "w1"), (Role::Up, "w3"), (Role::Down, "w2")];
const WI_WO: &[(Role, &str)] = &[(Role::Up, "wi"), (Role::Down, "wo")];
const FC1_FC2: &[(Role, &str)] = &[(Role::Up, "fc1"), (Role::Down, "fc2")];
const W1_V1_W2: &[(Role, &str)] = &[(Role::Gate, "w1"), (Role::Up, "v1"), (Role::Down, "w2")];

pub(crate) const MLP_ROUTERS: &[&str] =
    &["mlp.gate.weight", "mlp.gate.wg.weight", "mlp.router.gate.weight"];
const MLP_CORRECTIONS: &[&str] = &[
    "mlp.gate.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction_bias",
    "mlp.expert_bias",
];

/// Layouts that several families share, or that are told apart by their order.
pub(super) const SHARED: &[&Layout] =
    &[&QWEN, &JAMBA, &MIXTRAL, &LFM2, &GPT_OSS, &FUSED, &LLAMA4, &GRANITE, &SWITCH, &NLLB, &DBRX];

/// Most families since Qwen2-MoE and DeepSeek-V2.
pub(crate) static QWEN: Layout = Layout {
    name: "qwen",
    experts: Experts::Each { before: "mlp.experts.", projections: GATE_UP_DOWN },
    router: MLP_ROUTERS,
    router_bias: &[],
    correction: MLP_CORRECTIONS,
};

/// Jamba.
pub(crate) static JAMBA: Layout = Layout {
    name: "jamba",
    experts: Experts::Each { before: "feed_forward.experts.", projections: GATE_UP_DOWN },
    router: &["feed_forward.router.weight"],
    router_bias: &[],
    correction: &[],
};

/// Mixtral, Phi-3.5-MoE, MiniMax.
pub(crate) static MIXTRAL: Layout = Layout {
    name: "mixtral",
    experts: Experts::Each { before: "block_sparse_moe.experts.", projections: W1_W3_W2 },
    router: &["block_sparse_moe.gate.weight"],
    router_bias: &[],
    correction: &[
        "block_sparse_moe.e_score_correction_bias",
        "block_sparse_moe.gate.e_score_correction_bias",
    ],
};

/// LFM2-MoE.
pub(crate) static LFM2: Layout = Layout {
    name: "lfm2",
    experts: Experts::Each { before: "feed_forward.experts.", projections: W1_W3_W2 },
    router: &["feed_forward.gate.weight"],
    router_bias: &[],
    correction: &["feed_forward.expert_bias"],
};

/// gpt-oss: gate and up take turns; its router tells it from `FUSED`.
pub(crate) static GPT_OSS: Layout = Layout {
    name: "gpt_oss",
    experts: Experts::Interleaved {
        gate_up: "mlp.experts.gate_up_proj",
        down: "mlp.experts.down_proj",
    },
    router: &["mlp.router.weight"],
    router_bias: &["mlp.router.bias"],
    correction: &[],
};

/// What transformers 5 holds in memory, Qwen3.5-MoE on the hub.
pub(crate) static FUSED: Layout = Layout {
    name: "fused",
    experts: Experts::Fused { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" },
    router: MLP_ROUTERS,
    router_bias: &[],
    correction: MLP_CORRECTIONS,
};

/// Llama-4.
pub(crate) static LLAMA4: Layout = Layout {
    name: "llama4",
    experts: Experts::Fused {
        gate_up: "feed_forward.experts.gate_up_proj",
        down: "feed_forward.experts.down_proj",
    },
    router: &["feed_forward.router.weight"],
    router_bias: &[],
    correction: &[],
};

/// Granite.
pub(crate) static GRANITE: Layout = Layout {
    name: "granite",
    experts: Experts::Fused {
        gate_up: "block_sparse_moe.input_linear.weight",
        down: "block_sparse_moe.output_linear.weight",
    },
    router: &["block_sparse_moe.router.layer.weight"],
    router_bias: &[],
    correction: &[],
};

/// Switch Transformers.
pub(crate) static SWITCH: Layout = Layout {
    name: "switch",
    experts: Experts::Each { before: "mlp.experts.expert_", projections: WI_WO },
    router: &["mlp.router.classifier.weight"],
    router_bias: &["mlp.router.classifier.bias"],
    correction: &[],
};

/// NLLB-MoE.
pub(crate) static NLLB: Layout = Layout {
    name: "nllb",
    experts: Experts::Each { before: "ffn.experts.expert_", projections: FC1_FC2 },
    router: &["ffn.router.classifier.weight"],
    router_bias: &["ffn.router.classifier.bias"],
    correction: &[],
};

/// DBRX.
pub(crate) static DBRX: Layout = Layout {
    name: "dbrx",
    experts: Experts::Flat { before: "ffn.experts.mlp.", projections: W1_V1_W2 },
    router: &["ffn.router.layer.weight"],
    router_bias: &[],
    correction: &[],
};
