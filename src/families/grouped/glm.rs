//! GLM-4-MoE: half of each head rotated, optional norms on each head, shared experts. GLM-4.5V's
//! language model has positions on three axes, which the forward pass does not know.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Routing, Runtimes,
    SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["glm4_moe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(1.0, (1, 1)),
        forward: Forward::Decoder(glm4),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["glm4v_moe", "glm4v_moe_text"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::deepseek_v3(1.0, (1, 1)),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
];

fn glm4(keys: Keys<'_>) -> Result<DecoderSpec> {
    let normed = keys.flag("use_qk_norm", false)?;
    let qk_norm = if normed { QkNorm::PerHead } else { QkNorm::None };
    decoder(keys, qk_norm, RopeDefaults { part: 0.5, ..RopeDefaults::theta(1e4) })
}

fn decoder(keys: Keys<'_>, qk_norm: QkNorm, rope: RopeDefaults) -> Result<DecoderSpec> {
    let attention = GroupedSpec {
        qk_norm,
        qkv_bias: keys.flag("attention_bias", false)?,
        ..GroupedSpec::read(keys, rope)?
    };
    let shared = SharedSpec::plain(keys, "n_shared_experts", 1)?;
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-5, attention.in_every_layer(keys)?)? })
}
