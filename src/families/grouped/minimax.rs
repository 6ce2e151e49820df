//! MiniMax-M2: norms on the whole query and key projections, a part of each head rotated.
//! MiniMax-01 has linear attention, which the forward pass does not know.

use crate::error::Result;
use crate::families::layout::{FUSED, MIXTRAL};
use crate::families::routing::{Renormalise, Routing};
use crate::families::{
    DecoderSpec, Family, Forward, GroupedSpec, Keys, QkNorm, RopeDefaults, Runtimes,
};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_types: &["minimax_m2"],
        layouts: &[&MIXTRAL, &FUSED],
        routing: Routing { renormalise: Renormalise::Always, ..Routing::SIGMOID },
        forward: Forward::Decoder(m2),
        runtimes: Runtimes::BOTH,
    },
    Family {
        model_types: &["minimax"],
        layouts: &[&MIXTRAL, &FUSED],
        routing: Routing::softmax(Renormalise::Always),
        forward: Forward::Imported,
        runtimes: Runtimes::UNKNOWN,
    },
];

fn m2(keys: Keys<'_>) -> Result<DecoderSpec> {
    let mut rope = RopeDefaults::theta(5e6);
    if let Some(rotated) = keys.optional_size("rotary_dim")? {
        let head_dim = GroupedSpec::read(keys, rope)?.head_dim;
        rope.part = rotated as f64 / head_dim as f64;
    }
    let attention = GroupedSpec { qk_norm: QkNorm::Whole, ..GroupedSpec::read(keys, rope)? };
    DecoderSpec::read(keys, 1e-6, attention.in_every_layer(keys)?)
}
