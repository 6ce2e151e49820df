//! The change of variables in which a plain least-squares fit is one of the layer's output.

use ndarray::{Array2, ArrayView2};

use crate::error::{Error, Result};
use crate::stage::{Context, Moments};

/// A lower Cholesky factor `S` of `C = Σ x xᵀ / tokens + ε (tr/n) I = S Sᵀ`, in `f64`.
///
/// `‖E S‖_F²` is the mean of `‖E x‖²` over the tokens (plus the damping), so the best low-rank
/// approximation of `W S` is the one that changes the outputs least. `S` is divided by through
/// triangular solves; its inverse is never formed.
///
/// Moments of fewer tokens than features are singular: the damping `ε` that was asked for is
/// raised tenfold until the factorisation succeeds, and [`Whitening::damping`] says which it was.
/// Moments that are all zero weigh all features alike.
#[derive(Debug, Clone)]
pub struct Whitening {
    lower: Array2<f64>,
    damping: f64,
}

/// The damping that follows one of 0, and the last that is tried: then `C` is nearly a multiple of
/// the identity, and a failure has another reason.
const DAMPING: (f64, f64) = (1e-10, 1.0);

impl Whitening {
    /// Factorises damped moments. `n³/3` operations.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a negative damping;
    /// [`ErrorKind::Numerical`](crate::ErrorKind::Numerical) when no damping up to 1 makes the
    /// moments positive definite, which means that they are not those of any inputs.
    pub fn new(moments: &Moments, damping: f64, cx: &Context) -> Result<Self> {
        Self::of(moments.mean(), damping, cx)
    }

    /// The same from a mean second moment.
    pub(super) fn of(mut mean: Array2<f64>, damping: f64, cx: &Context) -> Result<Self> {
        if damping.is_nan() || damping < 0.0 {
            return Err(Error::range("damping", "0 or more", damping));
        }
        let n = mean.nrows();
        let scale = mean.diag().sum() / n.max(1) as f64;
        if scale == 0.0 {
            return Ok(Self { lower: Array2::eye(n), damping });
        }
        let plain = mean.diag().to_owned();
        let mut tried = damping;
        loop {
            mean.diag_mut().assign(&plain.mapv(|x| x + tried * scale));
            match cx.backend().cholesky(mean.view()) {
                Ok(lower) => return Ok(Self { lower, damping: tried }),
                Err(error) if tried >= DAMPING.1 => return Err(error),
                Err(_) => tried = (tried * 10.0).max(DAMPING.0),
            }
        }
    }

    /// `ε`: above what was asked for when the moments were singular.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// `W S` for `W: (m, n)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the widths differ.
    pub fn apply(&self, weight: ArrayView2<'_, f32>, cx: &Context) -> Result<Array2<f32>> {
        let mut out = Array2::zeros((weight.nrows(), self.lower.ncols()));
        let lower = self.lower.mapv(|x| x as f32);
        cx.compute().gemm(1.0, weight, lower.view(), 0.0, out.view_mut())?;
        Ok(out)
    }

    /// `R S⁻¹` for `R: (r, n)`, by the triangular system `Sᵀ Xᵀ = Rᵀ` in `f64`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the widths differ.
    pub fn undo(&self, right: ArrayView2<'_, f32>, cx: &Context) -> Result<Array2<f32>> {
        let rhs = right.t().mapv(f64::from);
        let solved = cx.backend().solve_lower_transposed(self.lower.view(), rhs.view())?;
        Ok(solved.t().mapv(|x| x as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    #[test]
    fn the_norm_after_whitening_is_the_norm_of_the_output() {
        let cx = Context::cpu(0);
        let x = array![[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [2.0, 0.25, 1.0], [1.0, 1.0, 1.0]];
        let w = array![[0.5, -1.0, 2.0], [3.0, 0.0, 1.0]];
        let moments = Moments::of(x.view(), &Cpu::new()).unwrap();
        let white = Whitening::new(&moments, 0.0, &cx).unwrap();
        let rotated = white.apply(w.view(), &cx).unwrap();
        let square = |a: &Array2<f32>| a.iter().map(|x| x * x).sum::<f32>();
        approx::assert_relative_eq!(square(&rotated), square(&w.dot(&x.t())) / 4., epsilon = 1e-5);
        approx::assert_abs_diff_eq!(white.undo(rotated.view(), &cx).unwrap(), w, epsilon = 1e-5);
        assert_eq!(white.damping(), 0.0);
    }

    #[test]
    fn singular_moments_are_regularised_and_said_so() {
        let cx = Context::cpu(0);
        let one_token = Moments::of(array![[1.0, 2.0, 3.0]].view(), &Cpu::new()).unwrap();
        let white = Whitening::new(&one_token, 0.0, &cx).unwrap();
        assert!(white.damping() > 0.0 && white.damping() <= 1e-6, "{}", white.damping());
        let zero = Moments::new(Array2::zeros((2, 2)), 5).unwrap();
        let white = Whitening::new(&zero, 1e-6, &cx).unwrap();
        let w = array![[1.0, 2.0]];
        assert_eq!(white.apply(w.view(), &cx).unwrap(), w);
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        let cx = Context::cpu(0);
        let indefinite = Moments::new(array![[1.0, 0.0], [9.0, 1.0]], 1).unwrap();
        assert!(Whitening::new(&indefinite, 0.0, &cx).is_err());
        assert!(Whitening::new(&indefinite, -1.0, &cx).is_err());
    }
}
