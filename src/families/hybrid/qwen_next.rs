//! Qwen3-Next, Qwen3.5-MoE and Qwen3.6-MoE: three layers of gated delta net to one of attention,
//! whose outputs are gated; norms centred at zero; a quarter of each head rotated; a sigmoid-gated
//! shared expert. In text all three position axes of Qwen3.5 agree, so that its rotation is the
//! usual one; its vision tower is copied.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise, Routing};
use crate::families::{
    DecoderSpec, DeltaNetSpec, Family, Forward, GroupedSpec, Keys, MixerSpec, NormKind, NormSpec,
    QkNorm, RopeDefaults, Runtimes, SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["qwen3_next"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, true)),
        forward: Forward::Decoder(qwen3_next),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        layouts: &[&FUSED, &QWEN],
        routing: Routing::softmax(Renormalise::Always),
        forward: Forward::Decoder(qwen3_5),
        runtimes: Runtimes::UNKNOWN,
    },
];

fn qwen3_next(keys: Keys<'_>) -> Result<DecoderSpec> {
    decoder(keys, true)
}

fn qwen3_5(keys: Keys<'_>) -> Result<DecoderSpec> {
    decoder(keys, false)
}

fn decoder(keys: Keys<'_>, together: bool) -> Result<DecoderSpec> {
    let bias = keys.flag("attention_bias", false)?;
    let rope = RopeDefaults { part: 0.25, ..RopeDefaults::theta(1e4) };
    let attention = MixerSpec::Grouped(GroupedSpec {
        qk_norm: QkNorm::PerHead,
        qkv_bias: bias,
        out_bias: bias,
        gated: true,
        ..GroupedSpec::read(keys, rope)?
    });
    let delta = MixerSpec::DeltaNet(delta_net(keys, together)?);
    let mixer = |full| if full { attention.clone() } else { delta.clone() };
    let mixers = full_attention(keys)?.into_iter().map(mixer).collect();
    let shared = SharedSpec::SigmoidGated(keys.size("shared_expert_intermediate_size")?);
    let spec = DecoderSpec::read(keys, 1e-6, mixers)?;
    let norm = NormSpec { kind: NormKind::ZeroCentredRms, ..spec.norm };
    Ok(DecoderSpec { shared, norm, ..spec })
}

fn delta_net(keys: Keys<'_>, together: bool) -> Result<DeltaNetSpec> {
    let key_heads = keys.size("linear_num_key_heads")?;
    let value_heads = keys.size("linear_num_value_heads")?;
    if !value_heads.is_multiple_of(key_heads) {
        let expected = format!("a multiple of linear_num_key_heads {key_heads}");
        return Err(keys.wrong("linear_num_value_heads", &expected, value_heads));
    }
    Ok(DeltaNetSpec {
        key_heads,
        value_heads,
        d_key: keys.size("linear_key_head_dim")?,
        d_value: keys.size("linear_value_head_dim")?,
        kernel: keys.optional_size("linear_conv_kernel_dim")?.unwrap_or(4),
        together,
    })
}

/// Which layers have attention: those that `layer_types` names; else each fourth, or as
/// `full_attention_interval` says.
fn full_attention(keys: Keys<'_>) -> Result<Vec<bool>> {
    let layers = keys.size("num_hidden_layers")?;
    if let Some(types) = keys.per_layer("layer_types", layers)? {
        return Ok(types.iter().map(|t| *t == "full_attention").collect());
    }
    let interval = keys.optional_size("full_attention_interval")?.unwrap_or(4);
    Ok((1..=layers).map(|layer| layer.is_multiple_of(interval)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_fourth_layer_has_attention_unless_each_layer_says() {
        let mut config = json!({"num_hidden_layers": 5});
        let of = |config: &serde_json::Value| full_attention(Keys::root(config)).unwrap();
        assert_eq!(of(&config), [false, false, false, true, false]);
        config["full_attention_interval"] = json!(2);
        assert_eq!(of(&config), [false, true, false, true, false]);
        config["layer_types"] = json!(vec!["full_attention"; 5]);
        assert_eq!(of(&config), [true; 5]);
    }
}
