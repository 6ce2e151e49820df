//! Encoder-decoder families.

mod nllb;
mod switch;

use super::Family;
pub(crate) use switch::SwitchSpec;

pub(super) const ALL: &[&[Family]] = &[switch::FAMILIES, nllb::FAMILIES];
