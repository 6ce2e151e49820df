//! The joint fit in the form of tokens, `Δᵀ = Φᵀ (Φ Φᵀ + λ I)⁻¹ R`: the solution of the normal
//! equations, from a system of as many equations as there are tokens to fit.

use std::ops::Range;

use ndarray::{Array2, Axis, s};

use super::features::Features;
use super::held_out::HeldOutSelector;
use super::normal_equations::Deltas;
use super::subsample::{Subsampled, evenly};
use crate::error::Result;
use crate::linalg::{Kernel, mean_eigenvalue, renew};
use crate::model::MergedLayer;
use crate::recover::best_so_far::squares;
use crate::stage::{Context, Recovery};

/// The most fitted tokens by which a ridge is chosen: a factorisation for each ridge would cost
/// more than the fit, and the noise that `λ` weighs against does not depend on how many there are.
pub(crate) const CHOICE_TOKENS: usize = 2048;

/// What is added to the down projections so that the layer gives the targets of `task`, if that is
/// better than nothing on the held-out rows. `ridges` are relative, the largest first.
pub(super) fn by_tokens(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    ridges: &[f64],
    cx: &Context,
) -> Result<Option<Deltas>> {
    let system = TokenSystem::new(task, merged, cx)?;
    let Some(lambda) = system.best_of(ridges, cx)? else { return Ok(None) };
    let TokenSystem { features, residual, kernel, held_out_rows, fitted } = system;
    let mut gram = kernel.own(&(0..fitted).collect::<Vec<_>>());
    drop(kernel);
    let given = residual.slice(s![..fitted, ..]).mapv(f64::from);
    let solved = cx.backend().solve_ridged(&mut gram, lambda, given.view())?;
    // The held-out rows take no part.
    let mut shares = Array2::zeros(residual.dim());
    shares.slice_mut(s![..fitted, ..]).zip_mut_with(&solved, |a, &b| *a = b as f32);
    let deltas = features.moments(&shares, cx)?;
    let held_out = residual.slice(s![held_out_rows.clone(), ..]).to_owned();
    let mut selector = HeldOutSelector::new(features.of(held_out_rows), held_out);
    selector.consider(deltas, cx)?;
    Ok(selector.best())
}

/// The `λ` whose fit does best on the held-out rows, for a fit to any number of tokens; `None` if
/// no feature is other than 0. `ridges` are relative, the largest first.
pub(super) fn choose(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    ridges: &[f64],
    cx: &Context,
) -> Result<Option<f64>> {
    let subsampled = Subsampled::of(task, CHOICE_TOKENS);
    TokenSystem::new(&subsampled.task(), merged, cx)?.best_of(ridges, cx)
}

/// A task in the form of tokens.
struct TokenSystem {
    features: Features,
    /// Of the layer at the start.
    residual: Array2<f32>,
    kernel: Kernel,
    fitted: usize,
    held_out_rows: Range<usize>,
}

impl TokenSystem {
    fn new(task: &Recovery<'_>, merged: &MergedLayer, cx: &Context) -> Result<Self> {
        let all = 0..task.inputs.nrows();
        let (features, residual) = Features::of_rows(task, all, merged, cx)?;
        let (kernel, fitted, held_out_rows) =
            (features.kernel()?, task.fitted(), task.held_out_rows());
        Ok(Self { features, residual, kernel, fitted, held_out_rows })
    }

    /// The `λ` of the best fit to at most [`CHOICE_TOKENS`] tokens; from the largest ridge down,
    /// until it gets worse.
    fn best_of(&self, ridges: &[f64], cx: &Context) -> Result<Option<f64>> {
        let chosen = evenly(self.fitted, CHOICE_TOKENS);
        let held_out: Vec<usize> = self.held_out_rows.clone().collect();
        let gram = self.kernel.own(&chosen);
        let cross = self.kernel.between(&chosen, &held_out);
        let mean = mean_eigenvalue(&gram, chosen.len().min(self.features.width()));
        if mean <= 0.0 {
            return Ok(None);
        }
        let given = self.residual.select(Axis(0), &chosen);
        let goal = self.residual.slice(s![self.held_out_rows.clone(), ..]);
        let (mut best, mut least) = (None, f64::INFINITY);
        let mut place = Array2::default((0, 0));
        for lambda in ridges.iter().map(|ridge| ridge * mean) {
            // How much a held-out token gets of the residual of every chosen one: they are mostly
            // fewer right-hand sides than output features.
            renew(&mut place, &gram)?;
            let shares = cx.backend().solve_ridged(&mut place, lambda, cross.view())?;
            let shares = shares.mapv(|x| x as f32);
            let mut left = goal.to_owned();
            cx.compute().gemm(-1.0, shares.t(), given.view(), 1.0, left.view_mut())?;
            let error = squares(left.view());
            if error >= least {
                break;
            }
            (best, least) = (Some(lambda), error);
        }
        Ok(best)
    }
}
