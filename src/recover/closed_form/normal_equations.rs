//! The normal equations of the joint fit, `(Φᵀ Φ + λ I) Δᵀ = Φᵀ R`, in two ways.

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

    /// By Cholesky; `ridge` is relative to the mean eigenvalue.
    pub(super) fn solve(&mut self, ridge: f64, cx: &Context) -> Result<Deltas> {
        renew(&mut self.place, &self.gram)?;
        let (place, lambda) = (&mut self.place, ridge * self.mean);
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

/// Conjugate gradients on the normal equations, a column of `Δᵀ` (an output feature) each its own
/// system, all in the same passes over the tokens.
#[derive(Debug)]
pub(super) struct ConjugateGradients<'a> {
    features: &'a Features,
    rhs: Deltas,
}

impl<'a> ConjugateGradients<'a> {
    pub(super) fn new(
        features: &'a Features,
        residual: &Array2<f32>,
        cx: &Context,
    ) -> Result<Self> {
        Ok(Self { features, rhs: features.moments(residual, cx)? })
    }

    /// Until every output feature's residual is below `tolerance` of its right-hand side, at most
    /// `iterations` times.
    pub(super) fn solve(
        self,
        lambda: f64,
        iterations: usize,
        tolerance: f64,
        cx: &Context,
    ) -> Result<Deltas> {
        let mut solution: Deltas = self.rhs.iter().map(|r| Array2::zeros(r.dim())).collect();
        let mut residual = self.rhs.clone();
        let mut direction = residual.clone();
        let mut energy = dots(&residual, &residual);
        let goal: Vec<f64> = energy.iter().map(|r| r * tolerance * tolerance).collect();
        for _ in 0..iterations {
            if energy.iter().zip(&goal).all(|(e, goal)| e <= goal) {
                break;
            }
            let applied = self.apply(&direction, lambda, cx)?;
            let curvature = dots(&direction, &applied);
            let open = |i: usize| energy[i] > goal[i] && curvature[i] > 0.0;
            let step: Vec<f64> = (0..goal.len())
                .map(|i| if open(i) { energy[i] / curvature[i] } else { 0.0 })
                .collect();
            axpy(&mut solution, &step, &direction);
            axpy(&mut residual, &step.iter().map(|s| -s).collect::<Vec<_>>(), &applied);
            let new = dots(&residual, &residual);
            let turn: Vec<f64> = new.iter().zip(&energy).map(|(n, e)| n / e.max(1e-300)).collect();
            turned(&mut direction, &turn, &residual);
            energy = new;
        }
        Ok(solution)
    }

    /// `(Φᵀ Φ + λ I) P`: one down pass over the tokens of each expert, and its transpose.
    fn apply(&self, p: &Deltas, lambda: f64, cx: &Context) -> Result<Deltas> {
        let Some(d) = p.first().map(Array2::nrows) else { return Ok(Vec::new()) };
        let mut pass = Array2::zeros((self.features.tokens(), d));
        let views: Vec<_> = p.iter().map(|p| p.view()).collect();
        self.features.subtract(&views, &mut pass, cx)?;
        let mut out = self.features.moments(&pass, cx)?;
        for (out, p) in out.iter_mut().zip(p) {
            out.zip_mut_with(p, |o, p| *o = lambda as f32 * p - *o);
        }
        Ok(out)
    }
}

/// For every output feature (row) the inner product over all experts, in `f64`.
fn dots(a: &Deltas, b: &Deltas) -> Vec<f64> {
    let mut sums = vec![0.0; a.first().map_or(0, Array2::nrows)];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a.rows()).zip(b.rows()) {
            *sum += a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        }
    }
    sums
}

/// `y ← y + step · x`, a step for every row.
fn axpy(y: &mut Deltas, step: &[f64], x: &Deltas) {
    for (y, x) in y.iter_mut().zip(x) {
        for ((mut y, x), step) in y.rows_mut().into_iter().zip(x.rows()).zip(step) {
            y.scaled_add(*step as f32, &x);
        }
    }
}

/// `p ← r + turn · p`, a turn for every row.
fn turned(p: &mut Deltas, turn: &[f64], r: &Deltas) {
    for (p, r) in p.iter_mut().zip(r) {
        for ((mut p, r), turn) in p.rows_mut().into_iter().zip(r.rows()).zip(turn) {
            p.zip_mut_with(&r, |p, r| *p = r + *turn as f32 * *p);
        }
    }
}
