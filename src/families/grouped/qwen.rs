//! Qwen2-MoE (biases on q, k, v; a sigmoid-gated shared expert) and Qwen3-MoE (norms on each query
//! and key head). Qwen3-VL-MoE's language model is Qwen3-MoE's with another position embedding.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise, Routing};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Runtimes, SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["qwen2_moe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, false)),
        forward: Forward::Decoder(qwen2),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["qwen3_moe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, false)),
        forward: Forward::Decoder(qwen3),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
        layouts: &[&FUSED],
        routing: Routing::softmax(Renormalise::Always),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
];

fn qwen2(keys: Keys<'_>) -> Result<DecoderSpec> {
    let attention = GroupedSpec {
        qkv_bias: keys.flag("qkv_bias", true)?,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e4))?
    };
    let mixers = attention.windowed(windows(keys)?);
    let shared = SharedSpec::SigmoidGated(keys.size("shared_expert_intermediate_size")?);
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-6, mixers)? })
}

/// Layers with a window as `layer_types` says; else every second one below `max_window_layers`.
fn windows(keys: Keys<'_>) -> Result<Vec<Option<usize>>> {
    let layers = keys.size("num_hidden_layers")?;
    let window = window(keys)?;
    if let Some(types) = keys.per_layer("layer_types", layers)? {
        return Ok(types.iter().map(|t| window.filter(|_| *t == "sliding_attention")).collect());
    }
    let below = keys.count("max_window_layers")?.unwrap_or(28);
    Ok((0..layers).map(|i| window.filter(|_| i % 2 == 0 && i < below)).collect())
}

fn window(keys: Keys<'_>) -> Result<Option<usize>> {
    let used = keys.flag("use_sliding_window", false)?;
    if used { keys.optional_size("sliding_window") } else { Ok(None) }
}

fn qwen3(keys: Keys<'_>) -> Result<DecoderSpec> {
    let bias = keys.flag("attention_bias", false)?;
    let attention = GroupedSpec {
        qk_norm: QkNorm::PerHead,
        qkv_bias: bias,
        out_bias: bias,
        window: window(keys)?,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e4))?
    };
    DecoderSpec::read(keys, 1e-6, attention.in_every_layer(keys)?)
}
