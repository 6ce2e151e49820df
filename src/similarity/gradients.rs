//! Similarity of the gradients of the experts' weights.

use serde::{Deserialize, Serialize};

use super::support::{check_kind, compare_parameters, row_of};
use crate::error::Result;
use crate::model::{Expert, Measure, RoutingStats, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares the gradients of the task loss: `concat(∇W_gate, ∇W_up, ∇W_down)`, biases included.
///
/// Accumulated in blocks, as [`ExpertWeights`](super::ExpertWeights), at the same cost.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `gradient` of the paper's code. *Deviations*: bias
/// gradients are compared too.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gradients {
    /// How two gradients are compared.
    pub measure: Measure,
}

/// Compares `W ⊙ ∇W`, the first-order change of the loss when a weight is removed: as
/// [`Gradients`], multiplied by the weights entry by entry.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `weight-gradient` of the paper's code. *Deviations*:
/// as [`Gradients`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightGradients {
    /// How two products are compared.
    pub measure: Measure,
}

impl Default for Gradients {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Default for WeightGradients {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for Gradients {
    fn name(&self) -> &str {
        "gradients"
    }

    fn needs(&self) -> Needs {
        Needs::GRADIENTS
    }
}

impl Stage for WeightGradients {
    fn name(&self) -> &str {
        "weight-gradients"
    }

    fn needs(&self) -> Needs {
        Needs::GRADIENTS | Needs::EXPERTS
    }
}

impl Similarity for Gradients {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        compare(layer, self.name(), None, self.measure, cx)
    }
}

impl Similarity for WeightGradients {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        compare(layer, self.name(), Some(experts), self.measure, cx)
    }
}

fn compare(
    layer: &LayerView<'_>,
    stage: &str,
    weights: Option<&[Expert]>,
    measure: Measure,
    cx: &Context,
) -> Result<SimilarityMatrix> {
    let gradients = RoutingStats::need(&layer.stats.gradients, stage, "gradients")?;
    let n = layer.len();
    let Some(like) = weights.unwrap_or(gradients).first().map(Expert::view) else {
        return SimilarityMatrix::from_gram(ndarray::Array2::zeros((n, n)).view(), measure);
    };
    check_kind("gradients of the experts", &like, n, gradients.iter().map(Expert::view))?;
    let copy = |i: usize, role, row, out: &mut [f32]| {
        if let Some(gradient) = gradients[i].view().linear(role) {
            out.iter_mut().zip(row_of(&gradient, row)).for_each(|(o, &g)| *o = g);
        }
        if let Some(weight) = weights.and_then(|experts| experts[i].view().linear(role)) {
            out.iter_mut().zip(row_of(&weight, row)).for_each(|(o, &w)| *o *= w);
        }
    };
    compare_parameters(&like, n, measure, copy, cx)
}
