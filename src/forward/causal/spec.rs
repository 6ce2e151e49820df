//! What is particular about a family of decoder-only models, as data read from `config.json`.

use serde_json::Value;

use super::spec_grouped;
use crate::error::{ErrorKind, Result};
use crate::forward::attention::rope::Rope;
use crate::forward::attention::rotation::Pairing;
use crate::forward::family::Family;
use crate::forward::keys::Keys;
use crate::model::Activation;

/// Where norms are applied to queries and keys, before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// On each head.
    PerHead,
    /// On the whole projection.
    Whole,
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedSpec {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// Clamps q, k, v to `±clip`.
    pub clip: Option<f32>,
    /// Per layer: how many tokens a query sees, itself included.
    pub windows: Vec<Option<usize>>,
    /// How rotated dimensions pair up.
    pub pairing: Pairing,
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Number of heads.
    pub heads: usize,
    /// Rank of the query's latent; `None` is a full projection.
    pub q_rank: Option<usize>,
    /// Rank of the common latent of keys and values.
    pub kv_rank: usize,
    /// Width of the part of a key that is not rotated.
    pub d_nope: usize,
    /// Width of the rotated part.
    pub d_rope: usize,
    /// Width of a value.
    pub d_value: usize,
    /// Biases on the projections to the latents and on the output.
    pub bias: bool,
    /// How rotated dimensions pair up.
    pub pairing: Pairing,
}

/// The attention of a family.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionSpec {
    /// Grouped queries.
    Grouped(GroupedSpec),
    /// Latent keys and values.
    Latent(LatentSpec),
}

/// Experts that every token visits, beside the routed ones.
#[derive(Debug, Clone, PartialEq)]
pub enum SharedSpec {
    /// None.
    None,
    /// One MLP `mlp.shared_experts` of this width (DeepSeek, GLM-4, dots1, ERNIE).
    Plain(usize),
    /// One MLP `mlp.shared_expert` of this width, times `sigmoid(w · x)` (Qwen2-MoE).
    SigmoidGated(usize),
}

/// A decoder-only model, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The family.
    pub family: Family,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of token ids.
    pub vocab: usize,
    /// `ε` of the layer norms.
    pub eps: f32,
    /// Width of dense MLPs; needed when a layer is dense.
    pub d_dense: Option<usize>,
    /// Biases in dense and shared MLPs.
    pub mlp_bias: bool,
    /// The non-linearity of dense and shared MLPs.
    pub activation: Activation,
    /// Attention.
    pub attention: AttentionSpec,
    /// Position embedding.
    pub rope: Rope,
    /// Shared experts.
    pub shared: SharedSpec,
    /// Whether the embedding is also the output projection.
    pub tied: bool,
    /// Token ids that end a generation.
    pub end: Vec<u32>,
}

impl Spec {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// Those of [`Family::of`]; [`ErrorKind::Config`] for a missing, ill-typed or contradictory
    /// key; [`ErrorKind::Unsupported`] for an activation or scaling that is not implemented, and
    /// for Switch, which is not a decoder-only model.
    pub fn parse(config: &Value) -> Result<Self> {
        let (family, keys) = (Family::of(config)?, Keys::root(config));
        let max_positions = keys.size("max_position_embeddings")?;
        let (attention, d_rotated, theta) = match family {
            Family::DeepseekV2 | Family::DeepseekV3 => {
                let latent = parse_latent(family, keys)?;
                let d_rope = latent.d_rope;
                (AttentionSpec::Latent(latent), d_rope, 1e4)
            }
            Family::Switch => {
                let (what, found) = ("decoder-only family", "switch_transformers".into());
                let supported = Family::causal();
                return Err(ErrorKind::Unsupported { what, found, supported }.into());
            }
            _ => {
                let grouped = spec_grouped::parse(family, keys)?;
                let theta = match family {
                    Family::Mixtral => 1e6,
                    Family::Ernie45Moe => 5e5,
                    Family::MinimaxM2 => 5e6,
                    _ => 1e4,
                };
                let head_dim = grouped.head_dim;
                (AttentionSpec::Grouped(grouped), head_dim, theta)
            }
        };
        let eps = match family {
            Family::Mixtral | Family::Olmoe | Family::Glm4Moe | Family::Ernie45Moe => 1e-5,
            _ => 1e-6,
        };
        let ernie = family == Family::Ernie45Moe;
        let biased = if ernie { "use_bias" } else { "mlp_bias" };
        let mlp_bias = (ernie || family == Family::DeepseekV2) && keys.flag(biased, false)?;
        if ernie && mlp_bias {
            // Its output projection has one too.
            let (what, supported) = ("biases of ERNIE-4.5", "use_bias = false".into());
            return Err(ErrorKind::Unsupported { what, found: "use_bias".into(), supported }.into());
        }
        let part = spec_grouped::rotated_part(family, keys, d_rotated)?;
        Ok(Self {
            family,
            d_model: keys.size("hidden_size")?,
            layers: keys.size("num_hidden_layers")?,
            vocab: keys.size("vocab_size")?,
            eps: keys.number("rms_norm_eps")?.unwrap_or(eps) as f32,
            d_dense: keys.optional_size("intermediate_size")?,
            mlp_bias,
            activation: activation(keys, "hidden_act")?,
            attention,
            rope: Rope::parse(keys, (d_rotated, part), theta, max_positions)?,
            shared: parse_shared(family, keys)?,
            tied: keys.flag("tie_word_embeddings", ernie)?,
            end: keys.tokens("eos_token_id")?,
        })
    }
}

pub(crate) fn activation(keys: Keys<'_>, key: &str) -> Result<Activation> {
    Ok(match keys.text(key)?.unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            let supported = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu".into();
            return Err(ErrorKind::Unsupported {
                what: "activation",
                found: other.into(),
                supported,
            }
            .into());
        }
    })
}

fn parse_latent(family: Family, keys: Keys<'_>) -> Result<LatentSpec> {
    // V2 pairs neighbours always, V3 unless it says otherwise.
    let neighbours = family == Family::DeepseekV2 || keys.flag("rope_interleave", true)?;
    Ok(LatentSpec {
        heads: keys.size("num_attention_heads")?,
        q_rank: keys.optional_size("q_lora_rank")?,
        kv_rank: keys.size("kv_lora_rank")?,
        d_nope: keys.size("qk_nope_head_dim")?,
        d_rope: keys.size("qk_rope_head_dim")?,
        d_value: keys.size("v_head_dim")?,
        bias: keys.flag("attention_bias", false)?,
        pairing: if neighbours { Pairing::Neighbours } else { Pairing::Halves },
    })
}

fn parse_shared(family: Family, keys: Keys<'_>) -> Result<SharedSpec> {
    let key = match family {
        Family::Qwen2Moe => {
            let width = keys.size("shared_expert_intermediate_size")?;
            return Ok(SharedSpec::SigmoidGated(width));
        }
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe | Family::Dots1 => {
            "n_shared_experts"
        }
        Family::Ernie45Moe => "moe_num_shared_experts",
        _ => return Ok(SharedSpec::None),
    };
    Ok(match keys.count(key)? {
        None | Some(0) => SharedSpec::None,
        Some(n) => SharedSpec::Plain(n * keys.size("moe_intermediate_size")?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mixtral() -> Value {
        json!({"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 128, "head_dim": null, "sliding_window": 16})
    }

    #[test]
    fn defaults_follow_the_family() {
        let spec = Spec::parse(&mixtral()).unwrap();
        assert_eq!((spec.eps, spec.rope.theta), (1e-5, 1e6));
        let AttentionSpec::Grouped(grouped) = spec.attention else { panic!() };
        assert_eq!((grouped.head_dim, grouped.qkv_bias), (8, false));
        assert_eq!(grouped.windows, [Some(16), Some(16)]);
    }

    #[test]
    fn unknown_families_are_told_what_is_possible() {
        let error = Spec::parse(&json!({"model_type": "gpt2"})).unwrap_err().to_string();
        assert!(error.contains("gpt2") && error.contains("olmoe"), "{error}");
        assert!(error.contains("statistics that were collected elsewhere"), "{error}");
        assert!(matches!(Family::of(&json!({})).unwrap_err().kind(), ErrorKind::Config { .. }));
    }

    #[test]
    fn keys_are_checked() {
        for (key, value, says) in [
            ("vocab_size", json!(null), "`vocab_size`"),
            ("num_attention_heads", json!("4"), "\"4\""),
            ("num_key_value_heads", json!(3), "a divisor"),
            ("hidden_act", json!("xielu"), "gelu_pytorch_tanh"),
            ("rms_norm_eps", json!([]), "a finite number"),
        ] {
            let mut config = mixtral();
            config[key] = value;
            let error = Spec::parse(&config).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
