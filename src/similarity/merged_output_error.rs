//! The output error of merging a pair, on the tokens of the pair.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::support::{Visits, over_pairs};
use crate::error::Result;
use crate::model::{Expert, Permutation, SimilarityMatrix};
use crate::par;
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// How an error becomes a similarity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorMapping {
    /// `1/(1 + mse)` of the mean squared error: 1 for no error, falling to 0.
    #[default]
    Sound,
    /// `1/(1 + 0.1 ln Σ)` of the sum of squared errors, as the paper's code computes it. It is not
    /// monotone: no error gives 0, `Σ = e⁻¹⁰` is a pole, and small errors come out negative. Only
    /// for reproducing published runs: with it the diagonal is not the largest entry.
    ReferenceCompat,
}

/// Merges experts `i` and `j` half and half and compares the outputs.
///
/// `mse_ij = (Σ_{x ∈ X_i} ‖Ê(x) − E_i(x)‖² + Σ_{x ∈ X_j} ‖Ê(x) − E_j(x)‖²) / ((|X_i| + |X_j|) d)`
/// with `Ê = (E_i + E_j)/2` in weight space, `X_i` the inputs routed to `i`, `d = d_model`.
/// Two experts without tokens have error 0 (similarity 1). The distance is `mse_ij`, or the sum of
/// squares with [`ErrorMapping::ReferenceCompat`].
///
/// Experts are merged as they are: align the layer first. Cost: a forward pass of `|X_i| + |X_j|`
/// tokens per pair, `≈ n t k` expert evaluations in all; memory: one merged expert and one pair's
/// hidden activations per thread, besides all experts' own outputs `(t k, d)`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `mse` of the paper's code. *Deviations*: the mapping,
/// see [`ErrorMapping`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergedOutputError {
    /// How the error becomes a similarity.
    pub mapping: ErrorMapping,
}

impl Stage for MergedOutputError {
    fn name(&self) -> &str {
        "merged-output-error"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS | Needs::SAMPLES
    }
}

impl Similarity for MergedOutputError {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        let visits = Visits::of(layer, self.name())?;
        let task = cx.per_task();
        let own = par::map(experts.len(), |i| {
            experts[i].view().forward(visits.inputs(i).view(), task.compute())
        })?;
        let same = Permutation::identity(experts[0].view().d_ff());
        over_pairs(experts.len(), |i, j| {
            let values = own[i].len() + own[j].len();
            if values == 0 {
                return Ok((1.0, 0.0));
            }
            let halves = [(0.5, experts[i].view(), &same), (0.5, experts[j].view(), &same)];
            let merged = Expert::weighted_sum(&halves, task.compute())?;
            let mut sum = 0.0;
            for e in [i, j] {
                let out = merged.view().forward(visits.inputs(e).view(), task.compute())?;
                sum += squared_difference(&out, own[e].view());
            }
            let mse = sum / values as f64;
            Ok(match self.mapping {
                ErrorMapping::Sound => (1.0 / (1.0 + mse), mse),
                ErrorMapping::ReferenceCompat => (1.0 / (1.0 + 0.1 * sum.ln()), sum),
            })
        })
    }
}

fn squared_difference(x: &Array2<f32>, y: ArrayView2<'_, f32>) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
}
