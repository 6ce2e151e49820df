//! Similarity of router logits over the tokens: the paper's default.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Measure, RoutingStats, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares columns `z_i: (t)` of the raw router logits `Z: (t, n)` over all observed tokens.
///
/// With the default [`Measure::Cosine`], `s_ij = (cos(z_i, z_j) + 1)/2`. Only the Gram matrix
/// `Zᵀ Z: (n, n)` is read, so the tokens can be streamed: `⟨z_i, z_j⟩` is all that any measure
/// needs. Cost: `O(n²)`.
///
/// Source: M-SMoE (arXiv 2310.01334, §3.2). *Deviations*: none for the cosine but the zero vector
/// (cosine 0) where the paper's code adds 1e-7 to the norms. Adding a number to all logits of a
/// token changes the similarity although it does not change the softmax; so it is in the paper.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterLogits {
    /// How two response profiles are compared.
    pub measure: Measure,
}

impl Default for RouterLogits {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for RouterLogits {
    fn name(&self) -> &str {
        "router-logits"
    }

    fn needs(&self) -> Needs {
        Needs::LOGIT_GRAM
    }
}

impl Similarity for RouterLogits {
    fn similarity(&self, layer: &LayerView<'_>, _cx: &Context) -> Result<SimilarityMatrix> {
        let what = "the router-logit Gram matrix";
        let gram = RoutingStats::need(&layer.stats.logit_gram, self.name(), what)?;
        let n = layer.len();
        if gram.dim() != (n, n) {
            return Err(Error::shape("router-logit Gram matrix", (n, n), gram.dim()));
        }
        SimilarityMatrix::from_gram(gram.view(), self.measure)
    }
}
