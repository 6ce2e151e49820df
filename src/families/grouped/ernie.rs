//! ERNIE-4.5-MoE: neighbouring dimensions rotated, shared experts, tied embeddings. Experts are
//! chosen by `p + correction`; the weight is `p` over the sum of those chosen.

use crate::error::{ErrorKind, Result};
use crate::families::layout::{FUSED, QWEN};
use crate::families::routing::{Renormalise, Routing};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, Pairing, RopeDefaults, Runtimes, SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["ernie4_5_moe"],
    layouts: &[&QWEN, &FUSED],
    routing: Routing::softmax(Renormalise::Always),
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::BOTH,
}];

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    if keys.flag("use_bias", false)? {
        // Its output projection has one too.
        let (what, supported) = ("biases of ERNIE-4.5", "use_bias = false".into());
        return Err(ErrorKind::Unsupported { what, found: "use_bias".into(), supported }.into());
    }
    let rope = RopeDefaults { pairing: Pairing::Neighbours, ..RopeDefaults::theta(5e5) };
    let mixers = GroupedSpec::read(keys, rope)?.in_every_layer(keys)?;
    Ok(DecoderSpec {
        shared: SharedSpec::plain(keys, "moe_num_shared_experts", 2)?,
        tied: keys.flag("tie_word_embeddings", true)?,
        ..DecoderSpec::read(keys, 1e-5, mixers)?
    })
}
