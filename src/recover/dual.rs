//! The joint fit in the form of tokens, `Δᵀ = Φᵀ (Φ Φᵀ + λ I)⁻¹ R`: the solution of the normal
//! equations, from a system of as many equations as there are tokens to fit.

use std::ops::Range;

use ndarray::{Array2, Axis, s};

use super::features::{Features, squares};
use super::jury::Jury;
use super::normal::Deltas;
use super::thinned::{Thinned, evenly};
use crate::error::Result;
use crate::linalg::{Kernel, mean_eigenvalue, renew};
use crate::model::MergedLayer;
use crate::stage::{Context, Recovery};

/// The most fitted tokens by which a ridge is chosen: a factorisation for each ridge would cost
/// more than the fit, and the noise that `λ` weighs against does not depend on how many there are.
pub(crate) const CHOOSING: usize = 2048;

/// What is added to the down projections so that the layer gives the targets of `task`, if that is
/// better than nothing on the rows that judge. `ridges` are relative, the largest first.
pub(super) fn by_tokens(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    ridges: &[f64],
    cx: &Context,
) -> Result<Option<Deltas>> {
    let system = System::new(task, merged, cx)?;
    let Some(lambda) = system.best_of(ridges, cx)? else { return Ok(None) };
    let System { features, residual, kernel, judging, fitted } = system;
    let mut gram = kernel.own(&(0..fitted).collect::<Vec<_>>());
    drop(kernel);
    let missed = residual.slice(s![..fitted, ..]).mapv(f64::from);
    let solved = cx.backend().solve_ridged(&mut gram, lambda, missed.view())?;
    // The rows that judge take no part.
    let mut shares = Array2::zeros(residual.dim());
    shares.slice_mut(s![..fitted, ..]).zip_mut_with(&solved, |a, &b| *a = b as f32);
    let deltas = features.moments(&shares, cx)?;
    let judged = residual.slice(s![judging.clone(), ..]).to_owned();
    let mut jury = Jury::new(features.of(judging), judged);
    jury.offer(deltas, cx)?;
    Ok(jury.best())
}

/// The `λ` whose fit does best on the rows that judge, for a fit to any number of tokens; `None` if
/// no feature is other than 0. `ridges` are relative, the largest first.
pub(super) fn choose(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    ridges: &[f64],
    cx: &Context,
) -> Result<Option<f64>> {
    let thinned = Thinned::of(task, CHOOSING);
    System::new(&thinned.task(), merged, cx)?.best_of(ridges, cx)
}

/// A task in the form of tokens.
struct System {
    features: Features,
    /// What the start misses.
    residual: Array2<f32>,
    kernel: Kernel,
    fitted: usize,
    judging: Range<usize>,
}

impl System {
    fn new(task: &Recovery<'_>, merged: &MergedLayer, cx: &Context) -> Result<Self> {
        let all = 0..task.inputs.nrows();
        let (features, residual) = Features::of_rows(task, all, merged, cx)?;
        let (kernel, fitted, judging) = (features.kernel()?, task.fitted(), task.judging());
        Ok(Self { features, residual, kernel, fitted, judging })
    }

    /// The `λ` of the best fit to at most [`CHOOSING`] tokens; from the largest ridge down, until
    /// it gets worse.
    fn best_of(&self, ridges: &[f64], cx: &Context) -> Result<Option<f64>> {
        let chosen = evenly(self.fitted, CHOOSING);
        let judges: Vec<usize> = self.judging.clone().collect();
        let gram = self.kernel.own(&chosen);
        let cross = self.kernel.between(&chosen, &judges);
        let mean = mean_eigenvalue(&gram, chosen.len().min(self.features.width()));
        if mean <= 0.0 {
            return Ok(None);
        }
        let given = self.residual.select(Axis(0), &chosen);
        let goal = self.residual.slice(s![self.judging.clone(), ..]);
        let (mut best, mut least) = (None, f64::INFINITY);
        let mut place = Array2::default((0, 0));
        for lambda in ridges.iter().map(|ridge| ridge * mean) {
            // How much a judge gets of what every chosen token misses: judges are mostly fewer
            // right-hand sides than output features.
            renew(&mut place, &gram)?;
            let shares = cx.backend().solve_ridged(&mut place, lambda, cross.view())?;
            let shares = shares.mapv(|x| x as f32);
            let mut left = goal.to_owned();
            cx.compute().gemm(-1.0, shares.t(), given.view(), 1.0, left.view_mut())?;
            let missed = squares(left.view());
            if missed >= least {
                break;
            }
            (best, least) = (Some(lambda), missed);
        }
        Ok(best)
    }
}
