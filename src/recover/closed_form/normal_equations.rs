//! The normal equations of the joint fit, `(Φᵀ Φ + λ I) Δᵀ = Φᵀ R`, formed.

use ndarray::{Array2, Axis, concatenate, s};

use super::features::Features;
use crate::error::{Error, Result};
use crate::linalg::{mean_eigenvalue, renew};
use crate::stage::Context;

/// What is added to each expert's down projection: `(d_model, d_ff)` each.
pub(super) type Deltas = Vec<Array2<f32>>;

/// The equations themselves, in `f64`. The right-hand side is summed in `f32`: that is as if the
/// residual were rounded once more, where a rounded Gram matrix would drown its small eigenvalues.
pub(super) struct NormalEquations<'a> {
    features: &'a Features,
    /// The lower triangle.
    gram: Array2<f64>,
    /// Where it is factorised: new memory for every ridge would cost a third of that.
    place: Array2<f64>,
    rhs: Array2<f64>,
    mean: f64,
}

impl<'a> NormalEquations<'a> {
    /// Nothing if no feature is other than 0.
    pub(super) fn new(
        features: &'a Features,
        residual: &Array2<f32>,
        cx: &Context,
    ) -> Result<Option<Self>> {
        let gram = features.gram()?;
        let mean = mean_eigenvalue(&gram, features.tokens().min(features.width()));
        if mean <= 0.0 {
            return Ok(None);
        }
        let rhs = stacked(&features.moments(residual, cx)?)?;
        Ok(Some(Self { features, gram, place: Array2::default((0, 0)), rhs, mean }))
    }

    /// The `λ` of a ridge, which is relative to the mean eigenvalue.
    pub(super) fn lambda(&self, ridge: f64) -> f64 {
        ridge * self.mean
    }

    /// By Cholesky.
    pub(super) fn solve(&mut self, ridge: f64, cx: &Context) -> Result<Deltas> {
        renew(&mut self.place, &self.gram)?;
        let lambda = self.lambda(ridge);
        let place = &mut self.place;
        let solution = cx.backend().solve_ridged(place, lambda, self.rhs.view())?;
        let mut first = 0;
        let deltas = self.features.parts.iter().map(|part| {
            let rows = first..first + part.hidden.ncols();
            first = rows.end;
            solution.slice(s![rows, ..]).t().mapv(|x| x as f32)
        });
        Ok(deltas.collect())
    }
}

/// One `(d_model, d_ff)` an expert as `(m · d_ff, d_model)`.
fn stacked(moments: &Deltas) -> Result<Array2<f64>> {
    let blocks: Vec<_> = moments.iter().map(|moments| moments.t()).collect();
    let stack = concatenate(Axis(0), &blocks)
        .map_err(|e| Error::shape("moments of a layer's experts", "the same d_model", e))?;
    Ok(stack.mapv(f64::from))
}
