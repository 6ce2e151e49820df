//! Similarity of the inputs that are routed to the experts.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::support::{Visits, compare_rows};
use crate::error::Result;
use crate::model::{Measure, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Compares the mean input `μ_i: (d_model)` of the tokens routed to each expert.
///
/// An expert without tokens has the zero vector. Sums in `f64`. Cost: `O((t k + n²) d_model)`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `feature` of the paper's code. *Deviations*: none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Feature {
    /// How two means are compared.
    pub measure: Measure,
}

/// Compares the mean magnitude of the inputs routed to each expert: as [`Feature`], of `|x|`.
///
/// Source: M-SMoE (arXiv 2310.01334), basis `feature.abs` of the paper's code. *Deviations*: none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureAbs {
    /// How two means are compared.
    pub measure: Measure,
}

impl Default for Feature {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Default for FeatureAbs {
    fn default() -> Self {
        Self { measure: Measure::Cosine }
    }
}

impl Stage for Feature {
    fn name(&self) -> &str {
        "feature"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Stage for FeatureAbs {
    fn name(&self) -> &str {
        "feature-abs"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Similarity for Feature {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        compare_rows(means(layer, self.name(), |x| x)?.view(), self.measure, cx)
    }
}

impl Similarity for FeatureAbs {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        compare_rows(means(layer, self.name(), f64::abs)?.view(), self.measure, cx)
    }
}

fn means(
    layer: &LayerView<'_>,
    stage: &str,
    of: impl Fn(f64) -> f64 + Sync,
) -> Result<Array2<f32>> {
    Visits::of(layer, stage)?.per_feature(of, |sum, count| sum / count)
}
