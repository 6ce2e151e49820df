//! The joint fit in the form of tokens, `Δᵀ = Φᵀ (Φ Φᵀ + λ I)⁻¹ R`: the same solution as that of the
//! normal equations, from a system of as many equations as there are tokens to fit.

use std::ops::Range;

use ndarray::{Array2, Axis, s};

use super::features::{Features, squares};
use super::jury::Jury;
use super::normal::Deltas;
use crate::error::Result;
use crate::linalg::Kernel;
use crate::model::MergedLayer;
use crate::stage::{Context, Recovery};

/// The most fitted tokens by which a ridge is chosen. A factorisation per ridge would cost more than
/// all else, and the ridge is relative to the mean eigenvalue, which hardly depends on how many
/// tokens there are as long as features are more.
const CHOOSING: usize = 4096;

/// What is added to the down projections so that the layer gives the targets of `task`, if that is
/// better than nothing on the rows that judge. `ridges` are relative, the largest first.
pub(super) fn by_tokens(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    ridges: &[f64],
    cx: &Context,
) -> Result<Option<Deltas>> {
    let features = Features::new(merged, task.narrowed, task.inputs, cx)?;
    let residual = features.residual(merged, task.targets, cx)?;
    let judging = residual.slice(s![task.judging(), ..]).to_owned();
    let mut jury = Jury::new(features.of(task.judging()), judging);
    let width = features.width();
    let (kernel, fitted, judging) = (features.kernel()?, task.fitted(), task.judging());
    let system = System { kernel: &kernel, residual: &residual, fitted, judging, width };
    let Some(ridge) = system.best_of(ridges, cx)? else { return Ok(None) };
    let gram = kernel.own(&(0..fitted).collect::<Vec<_>>());
    drop(kernel);
    let lambda = ridge * mean_eigenvalue(&gram, width);
    let missed = residual.slice(s![..fitted, ..]).mapv(f64::from);
    let solved = cx.factorise().solve_ridged(gram, lambda, missed.view())?;
    // The rows that judge take no part.
    let mut shares = Array2::zeros(residual.dim());
    shares.slice_mut(s![..fitted, ..]).zip_mut_with(&solved, |a, &b| *a = b as f32);
    jury.offer(features.moments(&shares, cx)?, cx)?;
    Ok(jury.best())
}

/// Products between tokens, and what the start misses for them.
struct System<'a> {
    kernel: &'a Kernel,
    residual: &'a Array2<f32>,
    fitted: usize,
    judging: Range<usize>,
    /// Features.
    width: usize,
}

impl System<'_> {
    /// The ridge whose fit to at most [`CHOOSING`] tokens does best on those that judge; from the
    /// largest down, until it gets worse.
    fn best_of(&self, ridges: &[f64], cx: &Context) -> Result<Option<f64>> {
        let (t, n) = (self.fitted, self.fitted.min(CHOOSING));
        let chosen: Vec<usize> = (0..n).map(|i| i * t / n).collect();
        let judges: Vec<usize> = self.judging.clone().collect();
        let gram = self.kernel.own(&chosen);
        let cross = self.kernel.between(&chosen, &judges);
        let scale = mean_eigenvalue(&gram, self.width);
        if scale <= 0.0 {
            return Ok(None);
        }
        let given = self.residual.select(Axis(0), &chosen);
        let goal = self.residual.slice(s![self.judging.clone(), ..]);
        let (mut best, mut least) = (None, f64::INFINITY);
        for &ridge in ridges {
            // How much a judge gets of what every chosen token misses: judges are mostly fewer
            // right-hand sides than output features.
            let shares = cx.factorise().solve_ridged(gram.clone(), ridge * scale, cross.view())?;
            let shares = shares.mapv(|x| x as f32);
            let mut left = goal.to_owned();
            cx.compute().gemm(-1.0, shares.t(), given.view(), 1.0, left.view_mut())?;
            let missed = squares(left.view());
            if missed >= least {
                break;
            }
            (best, least) = (Some(ridge), missed);
        }
        Ok(best)
    }
}

/// `tr(G) / min(t, features)`: the mean of the eigenvalues that can differ from 0.
fn mean_eigenvalue(gram: &Array2<f64>, features: usize) -> f64 {
    gram.diag().sum() / gram.nrows().min(features).max(1) as f64
}
