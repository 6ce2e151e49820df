//! The dominant expert in place of its group.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::Expert;
use crate::stage::{Context, Members, Merger, Stage};

/// Keeps the dominant member as it is; the others are absorbed with weight 0.
///
/// `W' = P_d(W_d)`. With the `n`-row router the tokens of the absorbed members visit the dominant
/// expert; with a narrowed one this is pruning. It is the naive member of the mergers: their
/// baseline, and with groups of one the identity.
///
/// Source: the "replace" baseline of M-SMoE (arXiv 2310.01334, §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DominantOnly;

impl Stage for DominantOnly {
    fn name(&self) -> &str {
        "dominant-only"
    }
}

impl Merger for DominantOnly {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        members.aligned(members.dominant, cx)
    }
}
