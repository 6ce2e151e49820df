//! A narrowed router of the members' mean rows.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::narrowed_rule;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::weighted::normalised;
use crate::model::{Grouping, Router};
use crate::stage::{Context, LayerView, RouterMerger, Stage};

/// `r'_g = Σ_{i ∈ g} u_i r_i / Σ u_i`: the usage-weighted mean of the members' rows, biases and
/// correction biases; equal weights in a group that no token visited.
///
/// The mean logit is at most the log-mean-exp of the members' logits (Jensen), so that a group of
/// disagreeing members is chosen less often than its members were; [`LogSumExpFit`] repairs that.
///
/// Shapes: `(m, d)` from `(n, d)`. Cost: `O(n d)`. Source: none; the router's twin of M-SMoE's
/// weighted merge.
///
/// [`LogSumExpFit`]: super::LogSumExpFit
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MeanRow;

impl Stage for MeanRow {
    fn name(&self) -> &str {
        "mean-row"
    }
}

impl RouterMerger for MeanRow {
    fn merge_router(
        &self,
        layer: &LayerView<'_>,
        grouping: &Grouping,
        _: &Context,
    ) -> Result<Router> {
        let rule = narrowed_rule(layer, grouping)?;
        let usage = layer.stats.usage();
        if usage.len() != layer.len() {
            return Err(Error::shape("usage of a layer", layer.len(), usage.len()));
        }
        let mut shares = Vec::with_capacity(grouping.groups());
        for g in 0..grouping.groups() {
            let members = grouping.members(g);
            let weights: Vec<f64> = members.iter().map(|&i| usage[i]).collect();
            let pairs = members.into_iter().zip(normalised(&weights)?);
            shares.push(pairs.collect::<Vec<_>>());
        }
        let vector =
            |v: &Array1<f32>| mean(v.view().insert_axis(Axis(1)), &shares).column(0).into_owned();
        Router::new(
            mean(layer.router.weight(), &shares),
            layer.router.bias().map(vector),
            layer.router.correction().map(vector),
            rule,
        )
    }
}

/// `Σ share · row`, per group, summed in `f64`.
fn mean(rows: ArrayView2<'_, f32>, groups: &[Vec<(usize, f64)>]) -> Array2<f32> {
    let mut out = Array2::zeros((groups.len(), rows.ncols()));
    for (mut out, members) in out.rows_mut().into_iter().zip(groups) {
        let mut sum = Array1::<f64>::zeros(rows.ncols());
        for &(i, share) in members {
            sum.zip_mut_with(&rows.row(i), |s, &w| *s += share * f64::from(w));
        }
        out.zip_mut_with(&sum, |out, &s| *out = s as f32);
    }
    out
}
