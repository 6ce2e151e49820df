//! Similarity of router rows.

use serde::{Deserialize, Serialize};

use super::support::compare_rows;
use crate::error::Result;
use crate::model::{Measure, SimilarityMatrix};
use crate::stage::{Context, LayerView, Similarity, Stage};

/// Compares rows `R[i, :]: (d_model)` of the router weight `R: (n, d_model)`.
///
/// Needs no calibration data at all. Cost: `O(n² d_model)`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `router-weight` of the paper's code. *Deviations*:
/// none. Router biases are left out, as in the paper.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterWeights {
    /// How two rows are compared.
    pub measure: Measure,
}

impl Default for RouterWeights {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for RouterWeights {
    fn name(&self) -> &str {
        "router-weights"
    }
}

impl Similarity for RouterWeights {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        compare_rows(layer.router.weight(), self.measure, cx)
    }
}
