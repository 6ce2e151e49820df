//! GLM-4-MoE: half of each head rotated, optional norms on each head, shared experts.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Routing, Runtimes,
    SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["glm4_moe"],
    layouts: &[&QWEN, &FUSED],
    routing: Routing::deepseek_v3(1.0, (1, 1)),
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::BOTH,
}];

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    let normed = keys.flag("use_qk_norm", false)?;
    let attention = GroupedSpec {
        qk_norm: if normed { QkNorm::PerHead } else { QkNorm::None },
        qkv_bias: keys.flag("attention_bias", false)?,
        ..GroupedSpec::read(keys, RopeDefaults { part: 0.5, ..RopeDefaults::theta(1e4) })?
    };
    let shared = SharedSpec::plain(keys, "n_shared_experts", 1)?;
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-5, attention.in_every_layer(keys)?)? })
}
