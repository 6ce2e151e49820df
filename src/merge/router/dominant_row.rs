//! A narrowed router of the dominant experts' rows.

use super::narrowed_rule;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::{Grouping, Router};
use crate::stage::{Context, LayerView, RouterMerger, Stage};

/// Keeps the dominant expert's row, bias and correction bias of each group: what an expert-pruned
/// model has.
///
/// Tokens of the other members go wherever the dominant experts' scores send them, and a group
/// gets less probability mass than its members had together.
///
/// Source: the `fuse` profile of M-SMoE's published code, whose accuracy is not reported. Shapes:
/// `(m, d)` from `(n, d)`. Cost: a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DominantRow;

impl Stage for DominantRow {
    fn name(&self) -> &str {
        "dominant-row"
    }
}

impl RouterMerger for DominantRow {
    fn merge_router(
        &self,
        layer: &LayerView<'_>,
        grouping: &Grouping,
        _: &Context,
    ) -> Result<Router> {
        layer.router.select(grouping.dominants(), narrowed_rule(layer, grouping)?)
    }
}
