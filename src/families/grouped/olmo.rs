//! OLMoE: norms on the whole query and key projections, optional clipping. FlexOLMo is the same
//! with norms behind its blocks.

use crate::error::Result;
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{NORM_TOPK_PROB, Renormalise, Routing};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Runtimes,
};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["olmoe"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, false)),
        forward: Forward::Decoder(olmoe),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["flex_olmo"],
        layouts: &[&QWEN, &FUSED],
        routing: Routing::softmax(Renormalise::Key(NORM_TOPK_PROB, false)),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
];

fn olmoe(keys: Keys<'_>) -> Result<DecoderSpec> {
    let bias = keys.flag("attention_bias", false)?;
    let attention = GroupedSpec {
        qk_norm: QkNorm::Whole,
        qkv_bias: bias,
        out_bias: bias,
        clip: keys.number("clip_qkv")?.map(|clip| clip as f32),
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e4))?
    };
    DecoderSpec::read(keys, 1e-5, attention.in_every_layer(keys)?)
}
