//! dots1: Qwen3-MoE's attention, DeepSeek-V3's router and shared experts.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Routing, Runtimes,
    SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["dots1"],
    layouts: &[&QWEN, &FUSED],
    routing: Routing {
        renormalise: Renormalise::Key(NORM_TOPK_PROB, false),
        ..Routing::deepseek_v3(1.0, (1, 1))
    },
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::BOTH,
}];

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    let bias = keys.flag("attention_bias", false)?;
    let attention = GroupedSpec {
        qk_norm: QkNorm::PerHead,
        qkv_bias: bias,
        out_bias: bias,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e4))?
    };
    let shared = SharedSpec::plain(keys, "n_shared_experts", 0)?;
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-6, attention.windowed(windows(keys)?))? })
}

/// Layers with a window as `layer_types` says; else all from `max_window_layers` on.
fn windows(keys: Keys<'_>) -> Result<Vec<Option<usize>>> {
    let layers = keys.size("num_hidden_layers")?;
    let window = keys.optional_size("sliding_window")?;
    if let Some(types) = keys.per_layer("layer_types", layers)? {
        return Ok(types.iter().map(|t| window.filter(|_| *t == "sliding_attention")).collect());
    }
    let from = keys.count("max_window_layers")?.unwrap_or(62);
    Ok((0..layers).map(|i| window.filter(|_| i >= from)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn windows_begin_at_a_layer_unless_each_layer_says() {
        let mut config =
            json!({"num_hidden_layers": 3, "sliding_window": 5, "max_window_layers": 1});
        assert_eq!(windows(Keys::root(&config)).unwrap(), [None, Some(5), Some(5)]);
        let each = ["sliding_attention", "full_attention", "full_attention"];
        config["layer_types"] = json!(each);
        assert_eq!(windows(Keys::root(&config)).unwrap(), [Some(5), None, None]);
        config["layer_types"] = json!(["full_attention"]);
        let error = windows(Keys::root(&config)).unwrap_err().to_string();
        assert!(error.contains("one name per layer"), "{error}");
    }
}
