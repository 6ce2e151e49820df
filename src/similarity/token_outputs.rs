//! Similarity of expert outputs, token by token: REAP's merging metric.

use ndarray::{Array2, ArrayView1, Axis};
use serde::{Deserialize, Serialize};

use super::support::Visits;
use crate::error::Result;
use crate::model::{Measure, SimilarityMatrix};
use crate::par;
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Cosine distance of the outputs of two experts, averaged over the tokens routed to either:
///
/// `D_ij = (Σ_{x ∈ X_i} δ(E_i(x), E_j(x)) + Σ_{x ∈ X_j} δ(E_i(x), E_j(x))) / (|X_i| + |X_j|)`
///
/// with `δ = 1 − cos`, `X_i` the inputs routed to `i`; similarity `1 − D_ij/2`, the mean of
/// `(cos + 1)/2`. A token routed to both counts twice. Two outputs that are both zero agree
/// (`δ = 0`); a pair that no token visited has distance 0, because merging it costs nothing.
///
/// Invariant to the order of hidden units. Every expert runs on every sampled token, 256 at a
/// time. Cost: `O(n t d_ff d_model)` and `t k n` cosines; memory: `n × 256 × d_model` outputs.
///
/// Source: REAP (arXiv 2510.13999), `ttm_similarity_matrix` of its code. *Deviations*: pairs
/// without tokens and zero outputs, as said; the sums are in `f64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenOutputs {}

/// Tokens for which the outputs of all experts are held at a time.
const TOKENS: usize = 256;

impl Stage for TokenOutputs {
    fn name(&self) -> &str {
        "token-outputs"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS | Needs::SAMPLES
    }
}

impl Similarity for TokenOutputs {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        let n = experts.len();
        let visits = Visits::of(layer, self.name())?;
        let mut sum = Array2::<f64>::zeros((n, n));
        let task = cx.per_task();
        for (block, x) in visits.samples.inputs.axis_chunks_iter(Axis(0), TOKENS).enumerate() {
            let outputs = par::map(n, |i| experts[i].view().forward(x, task.compute()))?;
            let first = block * TOKENS;
            let rows = par::map(n, |i| {
                let mut row = vec![0.0; n];
                for &t in in_block(&visits.tokens[i], first) {
                    let own = outputs[i].row(t - first);
                    for (j, total) in row.iter_mut().enumerate().filter(|(j, _)| *j != i) {
                        *total += distance(own, outputs[j].row(t - first));
                    }
                }
                Ok(row)
            })?;
            for (mut total, row) in sum.rows_mut().into_iter().zip(rows) {
                total.iter_mut().zip(row).for_each(|(t, d)| *t += d);
            }
        }
        SimilarityMatrix::from_pairs(n, |i, j| {
            let count = visits.tokens[i].len() + visits.tokens[j].len();
            let distance = (sum[[i, j]] + sum[[j, i]]) / count.max(1) as f64;
            Ok((1.0 - distance / 2.0, distance))
        })
    }
}

/// The tokens of an ascending list that lie in the block that starts at `first`.
fn in_block(tokens: &[usize], first: usize) -> &[usize] {
    let at = |bound: usize| tokens.partition_point(|&t| t < bound);
    &tokens[at(first)..at(first + TOKENS)]
}

/// Cosine distance in `f64`; 0 between two zero vectors.
fn distance(x: ArrayView1<'_, f32>, y: ArrayView1<'_, f32>) -> f64 {
    let (mut xx, mut yy, mut xy) = (0.0f64, 0.0f64, 0.0f64);
    for (&x, &y) in x.iter().zip(y) {
        let (x, y) = (f64::from(x), f64::from(y));
        (xx, yy, xy) = (xx + x * x, yy + y * y, xy + x * y);
    }
    if xx == 0.0 && yy == 0.0 { 0.0 } else { Measure::Cosine.of_gram(xx, yy, xy).1 }
}
