//! Similarity of weights, entry by entry.

use serde::{Deserialize, Serialize};

use super::support::{compare_parameters, row_of};
use crate::error::Result;
use crate::model::{Measure, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares `concat(vec W_gate, vec W_up, vec W_down)`, biases included.
///
/// The inner products are accumulated in `f64` over blocks of rows: the concatenation is never
/// laid out, and `n × 8192` values per thread are all that is copied. Cost: `n²` multiply-adds per
/// parameter of one expert.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `weight` of the paper's code; HC-SMoE
/// (arXiv 2410.08589), basis `weight`. *Deviations*: biases, where there are any, are compared too.
/// Not invariant to the order of hidden units: align the layer first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertWeights {
    /// How two weight vectors are compared.
    pub measure: Measure,
}

impl Default for ExpertWeights {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for ExpertWeights {
    fn name(&self) -> &str {
        "expert-weights"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS
    }
}

impl Similarity for ExpertWeights {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        let copy = |i: usize, role, row, out: &mut [f32]| {
            if let Some(linear) = experts[i].view().linear(role) {
                out.iter_mut().zip(row_of(&linear, row)).for_each(|(o, &w)| *o = w);
            }
        };
        compare_parameters(&experts[0].view(), experts.len(), self.measure, copy, cx)
    }
}
