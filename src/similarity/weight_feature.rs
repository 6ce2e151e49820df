//! Similarity of up projections, scaled by the size of each input feature of the expert.

use serde::{Deserialize, Serialize};

use super::support::{Visits, gram_of_rows};
use crate::error::Result;
use crate::model::{Measure, Role, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares `vec(W_up,i ⊙ n_i)` with `n_i: (d_model)`, the L2 norm of every feature over the inputs
/// routed to expert `i`, broadcast over the rows of `W_up,i: (d_ff, d_model)`.
///
/// Gated experts read the input with two matrices: `W_gate ⊙ n_i` follows `W_up ⊙ n_i` in the same
/// vector. An expert without tokens has the zero vector. Cost: as
/// [`ExpertWeights`](super::ExpertWeights) without the down projection, plus `O(t k d_model)`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `weight-feature` of the paper's code.
/// *Deviations*: gated experts, which the code does not know. Biases read no feature: left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightFeature {
    /// How two scaled weight vectors are compared.
    pub measure: Measure,
}

impl Default for WeightFeature {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for WeightFeature {
    fn name(&self) -> &str {
        "weight-feature"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS | Needs::SAMPLES
    }
}

impl Similarity for WeightFeature {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        let norms = Visits::of(layer, self.name())?.per_feature(|x| x * x, |sum, _| sum.sqrt())?;
        let n = experts.len();
        let mut gram = ndarray::Array2::zeros((n, n));
        for role in [Role::Gate, Role::Up] {
            let Some(like) = experts[0].view().linear(role) else { continue };
            let scaled = |i: usize, row: usize, out: &mut [f32]| {
                let Some(linear) = experts[i].view().linear(role) else { return };
                let weights = linear.weight.index_axis_move(ndarray::Axis(0), row);
                for ((o, &w), &m) in out.iter_mut().zip(weights).zip(norms.row(i)) {
                    *o = w * m;
                }
            };
            gram += &gram_of_rows(n, like.weight.dim(), scaled, cx)?;
        }
        SimilarityMatrix::from_gram(gram.view(), self.measure)
    }
}
