//! Mixtral: grouped queries, an optional sliding window in every layer.

use crate::error::Result;
use crate::families::routing::{Renormalise, Routing};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, RopeDefaults, Runtimes, layout,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["mixtral"],
    layouts: &[&layout::MIXTRAL, &layout::FUSED],
    routing: Routing::softmax(Renormalise::Always),
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::BOTH,
}];

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    let attention = GroupedSpec {
        window: keys.optional_size("sliding_window")?,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e6))?
    };
    DecoderSpec::read(keys, 1e-5, attention.in_every_layer(keys)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::MixerSpec;
    use serde_json::{Value, json};

    fn config() -> Value {
        json!({"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 128, "head_dim": null, "sliding_window": 16})
    }

    #[test]
    fn defaults_are_those_of_the_class() {
        let spec = decoder(Keys::root(&config())).unwrap();
        assert_eq!((spec.norm.eps, spec.longest_window, spec.mixers.len()), (1e-5, 128, 2));
        let MixerSpec::Grouped(grouped) = &spec.mixers[1] else { panic!() };
        assert_eq!((grouped.head_dim, grouped.qkv_bias), (8, false));
        assert_eq!(grouped.window, Some(16));
        assert_eq!(grouped.rope.as_ref().unwrap().theta, 1e6);
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
            let mut config = config();
            config[key] = value;
            let error = decoder(Keys::root(&config)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
