//! Families without a native forward pass: their statistics come from elsewhere.

mod attention;
mod hybrid;

use super::Family;

pub(super) const ALL: &[&[Family]] = &[attention::FAMILIES, hybrid::FAMILIES];
