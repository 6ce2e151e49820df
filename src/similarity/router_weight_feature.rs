//! Similarity of router rows, scaled by the size of each input feature.

use serde::{Deserialize, Serialize};

use super::support::{Visits, compare_rows};
use crate::error::Result;
use crate::model::{Finite, Measure, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares `R[i, :] ⊙ m` with `m: (d_model)`, `m_c = ‖X[:, c]‖₂` over all inputs `X: (t, d_model)`
/// of the layer.
///
/// A diagonal stand-in for [`RouterLogits`](super::RouterLogits): the Gram matrix of the logits
/// would be that of these vectors if features were uncorrelated. Cost: `O(t d_model + n² d_model)`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `router-weight-feature` of the paper's code.
/// *Deviations*: none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterWeightFeature {
    /// How two scaled rows are compared.
    pub measure: Measure,
}

impl Default for RouterWeightFeature {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for RouterWeightFeature {
    fn name(&self) -> &str {
        "router-weight-feature"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Similarity for RouterWeightFeature {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let visits = Visits::of(layer, self.name())?;
        let inputs = &visits.samples.inputs;
        let mut squares = vec![0.0f64; inputs.ncols()];
        for row in inputs.rows() {
            squares.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x) * f64::from(x));
        }
        let mut scaled = layer.router.weight().to_owned();
        for mut row in scaled.rows_mut() {
            row.iter_mut().zip(&squares).for_each(|(w, s)| *w *= s.sqrt() as f32);
        }
        scaled.check_finite("scaled router rows")?;
        compare_rows(scaled.view(), self.measure, cx)
    }
}
