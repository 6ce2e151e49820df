//! DeepSeek-V2 and V3; Kimi-K2 and GLM-4-MoE-lite are V3 under other names. Latent attention,
//! shared experts, leading dense layers; V3 takes YaRN's temperature into the scores.
//!
//! DeepSeek-V3.2 and GLM-5 are V3 with an indexer that chooses `index_topk` keys for each query
//! (arXiv 2512.02556, §2.1). In windows of at most so many tokens it chooses all, so that the dense
//! pass is exact; longer windows are refused. The indexer's tensors are copied.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{Groups, ROUTED_SCALING_FACTOR, Renormalise, Routing, Scale};
use crate::families::{
    DecoderSpec, Family, Forward, Keys, LatentSpec, MixerSpec, Pairing, Rope, RopeDefaults,
    Runtimes, SharedSpec,
};
use crate::model::GroupScore;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["deepseek_v2"],
        layouts: &[&QWEN, &FUSED],
        // `norm_topk_prob` is stored, and transformers ignores it.
        routing: Routing {
            scale: Scale::Key(ROUTED_SCALING_FACTOR, 1.0),
            groups: Some(Groups {
                score: GroupScore::Max,
                defaults: (1, 1),
                only_for: Some("group_limited_greedy"),
            }),
            ..Routing::softmax(Renormalise::Never)
        },
        forward: Forward::Decoder(v2),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["deepseek_v3", "kimi_k2"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(2.5, (8, 4)),
        forward: Forward::Decoder(v3),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["glm4_moe_lite"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(1.8, (1, 1)),
        forward: Forward::Decoder(glm4_lite),
        runtimes: Runtimes::UNKNOWN,
    },
    Family {
        model_types: &["deepseek_v32"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(2.5, (8, 4)),
        forward: Forward::Decoder(v32),
        runtimes: Runtimes::UNKNOWN,
    },
    Family {
        model_types: &["glm_moe_dsa"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(2.5, (1, 1)),
        forward: Forward::Decoder(glm5),
        runtimes: Runtimes::UNKNOWN,
    },
];

/// Neighbouring dimensions are rotated, always.
fn v2(keys: Keys<'_>) -> Result<DecoderSpec> {
    let spec = decoder(keys, 1e-6, Pairing::Neighbours, 2)?;
    Ok(DecoderSpec { mlp_bias: keys.flag("mlp_bias", false)?, ..spec })
}

/// Neighbouring dimensions are rotated, unless a key says otherwise.
fn like_v3(keys: Keys<'_>, eps: f64) -> Result<DecoderSpec> {
    let neighbours = keys.flag("rope_interleave", true)?;
    decoder(keys, eps, if neighbours { Pairing::Neighbours } else { Pairing::Halves }, 1)
}

fn v3(keys: Keys<'_>) -> Result<DecoderSpec> {
    like_v3(keys, 1e-6)
}

fn glm4_lite(keys: Keys<'_>) -> Result<DecoderSpec> {
    like_v3(keys, 1e-5)
}

fn v32(keys: Keys<'_>) -> Result<DecoderSpec> {
    indexed(keys, decoder(keys, 1e-6, Pairing::Neighbours, 1)?)
}

fn glm5(keys: Keys<'_>) -> Result<DecoderSpec> {
    indexed(keys, decoder(keys, 1e-5, Pairing::Neighbours, 1)?)
}

/// Windows are no longer than the number of keys that the indexer chooses.
fn indexed(keys: Keys<'_>, spec: DecoderSpec) -> Result<DecoderSpec> {
    let chosen = keys.optional_size("index_topk")?.unwrap_or(2048);
    if chosen >= spec.longest_window {
        return Ok(spec);
    }
    let limit = "index_topk: the forward pass has no sparse attention";
    Ok(DecoderSpec { longest_window: chosen, limit, ..spec })
}

fn decoder(keys: Keys<'_>, eps: f64, pairing: Pairing, shared: usize) -> Result<DecoderSpec> {
    let d_rope = keys.size("qk_rope_head_dim")?;
    let rope = RopeDefaults { pairing, ..RopeDefaults::theta(1e4) };
    let attention = MixerSpec::Latent(LatentSpec {
        heads: keys.size("num_attention_heads")?,
        q_rank: keys.optional_size("q_lora_rank")?,
        kv_rank: keys.size("kv_lora_rank")?,
        d_nope: keys.size("qk_nope_head_dim")?,
        d_rope,
        d_value: keys.size("v_head_dim")?,
        bias: keys.flag("attention_bias", false)?,
        rope: Rope::parse(keys, d_rope, rope)?,
    });
    let mixers = vec![attention; keys.size("num_hidden_layers")?];
    let shared = SharedSpec::plain(keys, "n_shared_experts", shared)?;
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, eps, mixers)? })
}
