//! gpt-oss: a sink in every head's softmax, a window in every second layer, biases everywhere,
//! positions scaled by YaRN; experts with a clamped SwiGLU whose gate and up take turns.

use crate::error::Result;
use crate::families::layout::GPT_OSS;
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, RopeDefaults, Routing, Runtimes,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["gpt_oss"],
    layouts: &[&GPT_OSS],
    routing: Routing::SOFTMAX_OF_TOP_K,
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::BOTH,
}];

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    if keys.inner("rope_parameters")?.or(keys.inner("rope_scaling")?).is_none() {
        return Err(keys.wrong("rope_parameters", "the scaling of positions", "nothing"));
    }
    let bias = keys.flag("attention_bias", true)?;
    let attention = GroupedSpec {
        qkv_bias: bias,
        out_bias: bias,
        sinks: true,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1.5e5))?
    };
    DecoderSpec::read(keys, 1e-5, attention.windowed(windows(keys)?))
}

/// Layers with a window as `layer_types` says; else every second one, from the first on.
fn windows(keys: Keys<'_>) -> Result<Vec<Option<usize>>> {
    let layers = keys.size("num_hidden_layers")?;
    let window = keys.optional_size("sliding_window")?;
    if let Some(types) = keys.per_layer("layer_types", layers)? {
        return Ok(types.iter().map(|t| window.filter(|_| *t == "sliding_attention")).collect());
    }
    Ok((0..layers).map(|i| window.filter(|_| i % 2 == 0)).collect())
}
