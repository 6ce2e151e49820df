//! Ridged normal equations of one projection, in `f64`: `Δ = argmin Σ ‖Δ x − r‖² + λ ‖Δ‖²`.

use ndarray::{Array2, ArrayView2};

use crate::error::{Error, Result};
use crate::linalg::{add_cross, mean_eigenvalue};
use crate::stage::Context;

/// `G = Σ x xᵀ: (in, in)` and `Σ x rᵀ: (in, out)`.
pub(super) struct Normal {
    gram: Array2<f64>,
    rhs: Array2<f64>,
}

impl Normal {
    pub(super) fn new(inputs: usize, outputs: usize) -> Self {
        Self { gram: Array2::zeros((inputs, inputs)), rhs: Array2::zeros((inputs, outputs)) }
    }

    /// Adds the rows of `X: (t, in)` with what is to be explained of each, `R: (t, out)`.
    pub(super) fn add(
        &mut self,
        x: ArrayView2<'_, f32>,
        r: ArrayView2<'_, f32>,
        cx: &Context,
    ) -> Result<()> {
        cx.compute().add_gram(x, &mut self.gram)?;
        add_cross(x, r, self.rhs.view_mut())
    }

    /// `Δ: (out, in)`, with `λ = ridge · tr(G) / in`; `None` without any input but zeros.
    pub(super) fn solve(mut self, ridge: f64, cx: &Context) -> Result<Option<Array2<f32>>> {
        let mean = mean_eigenvalue(&self.gram, self.gram.nrows());
        if mean <= 0.0 {
            return Ok(None);
        }
        let solution = cx.backend().solve_ridged(&mut self.gram, ridge * mean, self.rhs.view())?;
        Ok(Some(solution.t().mapv(|x| x as f32)))
    }

    /// Adds members' moments whose off-diagonal entries count for `alpha` of the diagonal ones.
    ///
    /// `gram` and `cross = G Wᵀ: (in, out)` are a member's own; `weight: (out, in)` is `W`.
    pub(super) fn add_scaled(
        &mut self,
        gram: &Array2<f64>,
        cross: &Array2<f64>,
        weight: ArrayView2<'_, f32>,
        alpha: f64,
    ) {
        self.gram.scaled_add(alpha, gram);
        for (own, given) in self.gram.diag_mut().iter_mut().zip(gram.diag()) {
            *own += (1.0 - alpha) * given;
        }
        self.rhs.scaled_add(alpha, cross);
        let columns = self.rhs.rows_mut().into_iter().zip(weight.columns()).zip(gram.diag());
        for ((mut sum, w), &g) in columns {
            sum.zip_mut_with(&w, |sum, &w| *sum += (1.0 - alpha) * g * f64::from(w));
        }
    }
}

/// Refuses what gives no positive definite system.
pub(super) fn check_ridge(ridge: f64) -> Result<()> {
    match ridge.is_finite() && ridge > 0.0 {
        true => Ok(()),
        false => Err(Error::range("ridge of a merge", "above 0", ridge)),
    }
}
