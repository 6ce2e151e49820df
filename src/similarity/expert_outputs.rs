//! Similarity of mean expert outputs (HC-SMoE).

use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::support::{Visits, compare_rows, stack};
use crate::error::{Error, Result};
use crate::model::{ExpertView, Measure, RoutingStats, SimilarityMatrix};
use crate::par;
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Over which tokens an expert's outputs are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputSource {
    /// The tokens routed to the expert: the mean outputs of the statistics.
    #[default]
    Routed,
    /// All sampled tokens, whichever expert they visited: every expert is run on all of them.
    All,
}

/// Compares mean outputs `ō_i: (d_model)`, not weighted by the router.
///
/// With [`OutputSource::All`] this is HC-SMoE's feature, `ō_i = (1/t) Σ_x E_i(x)` over all inputs;
/// since the down projection is linear, `ō_i = W_down h̄_i + b` and only the hidden activations are
/// computed per token. Cost: `O(n t d_ff d_model)`, memory: `1024 × d_ff` per thread. With
/// [`OutputSource::Routed`] the statistics hold the means already (REAP's
/// `routed_characteristic_activation`); an expert without tokens has the zero vector.
///
/// Invariant to the order of hidden units. Source: HC-SMoE (arXiv 2410.08589, §3.2), which uses the
/// Euclidean distance; REAP (arXiv 2510.13999). *Deviations*: none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertOutputs {
    /// How two mean outputs are compared.
    pub measure: Measure,
    /// Which tokens are averaged over.
    pub source: OutputSource,
}

impl Default for ExpertOutputs {
    fn default() -> Self {
        Self { measure: Measure::Euclidean, source: OutputSource::Routed }
    }
}

impl Stage for ExpertOutputs {
    fn name(&self) -> &str {
        "expert-outputs"
    }

    fn needs(&self) -> Needs {
        match self.source {
            OutputSource::Routed => Needs::MEAN_OUTPUT,
            OutputSource::All => Needs::EXPERTS | Needs::SAMPLES,
        }
    }
}

impl Similarity for ExpertOutputs {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let (n, d) = layer.router.weight().dim();
        match self.source {
            OutputSource::Routed => {
                let what = "mean expert outputs";
                let mean = RoutingStats::need(&layer.stats.mean_output, self.name(), what)?;
                if mean.dim() != (n, d) {
                    return Err(Error::shape(what, (n, d), mean.dim()));
                }
                compare_rows(mean.view(), self.measure, cx)
            }
            OutputSource::All => {
                let experts = layer.experts(self.name())?;
                let inputs = Visits::of(layer, self.name())?.samples.inputs.view();
                let task = cx.per_task();
                let mean = |i: usize| mean_output(&experts[i].view(), inputs, &task);
                let rows = par::map(n, mean)?;
                compare_rows(stack(rows, d, "mean expert outputs")?.view(), self.measure, cx)
            }
        }
    }
}

/// Tokens whose hidden activations are held at a time.
const TOKENS: usize = 1024;

fn mean_output(
    expert: &ExpertView<'_>,
    inputs: ArrayView2<'_, f32>,
    cx: &Context,
) -> Result<Vec<f32>> {
    if inputs.is_empty() {
        return Ok(vec![0.0; expert.d_model()]);
    }
    let mut sum = Array1::<f64>::zeros(expert.d_ff());
    for x in inputs.axis_chunks_iter(Axis(0), TOKENS) {
        for row in expert.hidden(x, cx.compute())?.rows() {
            sum.zip_mut_with(&row, |s, &h| *s += f64::from(h));
        }
    }
    let mean: Array2<f32> = sum.mapv(|s| (s / inputs.nrows() as f64) as f32).insert_axis(Axis(0));
    Ok(expert.down.forward(mean.view(), cx.compute())?.iter().copied().collect())
}
