//! Families with multi-head latent attention.

mod deepseek;

use super::Family;

pub(super) const ALL: &[&[Family]] = &[deepseek::FAMILIES];
