//! Which families have a native forward pass.

use serde_json::Value;

use crate::error::{ErrorKind, Result};
use crate::forward::keys::Keys;

/// The model families whose forward pass is native.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Mixtral: grouped-query attention, optional sliding window.
    Mixtral,
    /// Qwen2-MoE: biases on q, k, v; a sigmoid-gated shared expert.
    Qwen2Moe,
    /// Qwen3-MoE: norms on each query and key head.
    Qwen3Moe,
    /// OLMoE: norms on the whole query and key projections, optional clipping.
    Olmoe,
    /// DeepSeek-V2: latent attention, shared experts, leading dense layers.
    DeepseekV2,
    /// DeepSeek-V3, Kimi-K2 and GLM-4-MoE-lite: as V2, with YaRN's temperature; the router differs.
    DeepseekV3,
    /// GLM-4-MoE: half of each head rotated, optional norms on each head, shared experts.
    Glm4Moe,
    /// dots1: Qwen3-MoE's attention, DeepSeek-V3's router and shared experts.
    Dots1,
    /// ERNIE-4.5-MoE: neighbouring dimensions rotated, shared experts.
    Ernie45Moe,
    /// MiniMax-M2: norms on the whole query and key projections, a part of each head rotated.
    MinimaxM2,
    /// Switch Transformers: a T5 encoder and decoder.
    Switch,
}

const FAMILIES: [(&str, Family); 13] = [
    ("mixtral", Family::Mixtral),
    ("qwen2_moe", Family::Qwen2Moe),
    ("qwen3_moe", Family::Qwen3Moe),
    ("olmoe", Family::Olmoe),
    ("deepseek_v2", Family::DeepseekV2),
    ("deepseek_v3", Family::DeepseekV3),
    ("kimi_k2", Family::DeepseekV3),
    ("glm4_moe_lite", Family::DeepseekV3),
    ("glm4_moe", Family::Glm4Moe),
    ("dots1", Family::Dots1),
    ("ernie4_5_moe", Family::Ernie45Moe),
    ("minimax_m2", Family::MinimaxM2),
    ("switch_transformers", Family::Switch),
];

impl Family {
    /// The names of the decoder-only ones.
    pub(crate) fn causal() -> String {
        let causal = FAMILIES.iter().filter(|(_, family)| *family != Self::Switch);
        causal.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }

    /// The family that `model_type` names.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] without the key, [`ErrorKind::Unsupported`] for a family without a
    /// native forward pass.
    pub fn of(config: &Value) -> Result<Self> {
        let keys = Keys::root(config);
        let Some(name) = keys.text("model_type")? else {
            return Err(keys.wrong("model_type", "a model family", "nothing"));
        };
        if let Some((_, family)) = FAMILIES.iter().find(|(known, _)| *known == name) {
            return Ok(*family);
        }
        let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let supported = format!(
            "{} (any other family can be merged with statistics that were collected elsewhere)",
            known.join(", ")
        );
        let (what, found) = ("model family for a native forward pass", name.into());
        Err(ErrorKind::Unsupported { what, found, supported }.into())
    }
}
