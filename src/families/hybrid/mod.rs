//! Families whose layers mix tokens in more than one way: attention in some, linear attention,
//! state spaces or convolutions in others.

mod qwen_next;

use super::Family;

pub(super) const ALL: &[&[Family]] = &[qwen_next::FAMILIES];
