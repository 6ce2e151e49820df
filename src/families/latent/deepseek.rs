//! DeepSeek-V2 and V3; Kimi-K2 and GLM-4-MoE-lite are V3 under other names. Latent attention,
//! shared experts, leading dense layers; V3 takes YaRN's temperature into the scores.

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
        forward: Forward::Decoder(v3),
        runtimes: Runtimes::UNKNOWN,
    },
];

/// Neighbouring dimensions are rotated, always.
fn v2(keys: Keys<'_>) -> Result<DecoderSpec> {
    let spec = decoder(keys, Pairing::Neighbours, 2)?;
    Ok(DecoderSpec { mlp_bias: keys.flag("mlp_bias", false)?, ..spec })
}

/// Neighbouring dimensions are rotated, unless a key says otherwise.
fn v3(keys: Keys<'_>) -> Result<DecoderSpec> {
    let neighbours = keys.flag("rope_interleave", true)?;
    decoder(keys, if neighbours { Pairing::Neighbours } else { Pairing::Halves }, 1)
}

fn decoder(keys: Keys<'_>, pairing: Pairing, shared: usize) -> Result<DecoderSpec> {
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
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-6, mixers)? })
}
