//! Correlation of the experts' hidden units.

use ndarray::{Array2, Axis};
use serde::{Deserialize, Serialize};

use super::support::{Visits, over_pairs};
use crate::error::Result;
use crate::linalg::{assign, correlation};
use crate::model::{Finite, SimilarityMatrix};
use crate::stage::{Context, LayerView, Needs, Similarity, Stage};

/// Which units of two experts are compared with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// One to one, by linear assignment: `O(d_ff³)` per pair in the worst case.
    #[default]
    Assignment,
    /// Every unit with the one it correlates with most, in both directions.
    Maximum,
}

/// `s_ij = mean over matched units (a, b) of (C[a, b] + 1)/2`.
///
/// `C: (d_ff, d_ff)` is the Pearson correlation of the hidden activations of `i` and `j` on the
/// tokens routed to either. At most one token: similarity 1. Distance
/// `1 − s_ij`. Invariant to the order of hidden units. Cost: per pair two hidden passes on
/// `|X_i ∪ X_j|` tokens, a `d_ff² t` product, and the matching; memory: `d_ff²` per thread.
///
/// Source: M-SMoE (arXiv 2310.01334), bases `feature-correlation.lsa` and `.max` of the paper's
/// code. *Deviations*: a token routed to both experts counts once; the maximum is averaged over
/// both directions, because the table has to be symmetric whatever the order of the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureCorrelation {
    /// Which units are compared.
    pub matching: Matching,
}

impl Stage for FeatureCorrelation {
    fn name(&self) -> &str {
        "feature-correlation"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS | Needs::SAMPLES
    }
}

impl Similarity for FeatureCorrelation {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let experts = layer.experts(self.name())?;
        let visits = Visits::of(layer, self.name())?;
        let task = cx.per_task();
        over_pairs(experts.len(), |i, j| {
            let tokens = union(&visits.tokens[i], &visits.tokens[j]);
            if tokens.len() <= 1 {
                return Ok((1.0, 0.0));
            }
            let x = visits.samples.inputs.select(Axis(0), &tokens);
            let hidden = |e: usize| experts[e].view().hidden(x.view(), task.compute());
            let c = correlation(hidden(i)?.view(), hidden(j)?.view(), task.compute())?;
            c.check_finite("correlation of hidden activations")?;
            let mean = match self.matching {
                Matching::Assignment => assigned(&c)?,
                Matching::Maximum => largest(&c),
            };
            let s = (mean + 1.0) / 2.0;
            Ok((s, 1.0 - s))
        })
    }
}

/// Mean correlation of the units matched one to one.
fn assigned(c: &Array2<f32>) -> Result<f64> {
    let columns = assign(c.view())?.columns;
    let sum: f64 = c.rows().into_iter().zip(&columns).map(|(r, &b)| f64::from(r[b as usize])).sum();
    Ok(sum / columns.len().max(1) as f64)
}

/// Mean over rows of the largest entry, and the same over columns, averaged; one pass in row order.
fn largest(c: &Array2<f32>) -> f64 {
    let (mut rows, mut columns) = (0.0, vec![-1.0f32; c.ncols()]);
    for row in c.rows() {
        columns.iter_mut().zip(row).for_each(|(m, &x)| *m = m.max(x));
        rows += f64::from(row.fold(-1.0f32, |m, &x| m.max(x)));
    }
    let columns: f64 = columns.into_iter().map(f64::from).sum();
    (rows + columns) / (2 * c.nrows().max(1)) as f64
}

/// The union of two ascending lists, ascending.
fn union(a: &[usize], b: &[usize]) -> Vec<usize> {
    let mut all = [a, b].concat();
    all.sort_unstable();
    all.dedup();
    all
}
