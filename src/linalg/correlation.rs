//! Pearson correlation between the columns of two matrices.

use ndarray::{Array2, ArrayView2, Axis, Zip};

use super::device::compute::Compute;
use crate::error::{Error, Result};

/// Added to `σ_x σ_y`, as in the paper's code: a column that never changes correlates with nothing.
const EPSILON: f64 = 1e-7;

/// `C[a, b] = cov(x_a, y_b) / (σ(x_a) σ(y_b) + 1e-7)` between the columns of `X: (t, p)` and
/// `Y: (t, q)`: `(p, q)`, each entry in `[−1, 1]`.
///
/// Covariances and deviations are unbiased (`t − 1`); means and deviations are summed in `f64`,
/// the products in `f32`. With fewer than two rows every correlation is 0. Cost: one
/// `(p, t) × (t, q)` product.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the numbers of rows differ.
pub(crate) fn correlation(
    x: ArrayView2<'_, f32>,
    y: ArrayView2<'_, f32>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let t = x.nrows();
    if y.nrows() != t {
        return Err(Error::shape("correlation", (t, y.ncols()), y.dim()));
    }
    let mut out = Array2::zeros((x.ncols(), y.ncols()));
    if t < 2 {
        return Ok(out);
    }
    let ((x, sx), (y, sy)) = (centred(x), centred(y));
    compute.gemm(1.0 / (t - 1) as f32, x.t(), y.view(), 0.0, out.view_mut())?;
    for (mut row, sx) in out.rows_mut().into_iter().zip(&sx) {
        for (c, sy) in row.iter_mut().zip(&sy) {
            *c = (f64::from(*c) / (sx * sy + EPSILON)).clamp(-1.0, 1.0) as f32;
        }
    }
    Ok(out)
}

/// Columns minus their means, and their unbiased standard deviations.
fn centred(x: ArrayView2<'_, f32>) -> (Array2<f32>, Vec<f64>) {
    let (t, p) = x.dim();
    let (mut mean, mut square) = (vec![0.0f64; p], vec![0.0f64; p]);
    for row in x.rows() {
        mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v));
    }
    mean.iter_mut().for_each(|m| *m /= t as f64);
    let mut out = Array2::zeros((t, p));
    for (mut row, source) in out.axis_iter_mut(Axis(0)).zip(x.rows()) {
        Zip::from(&mut row).and(source).and(&mean[..]).and(&mut square[..]).for_each(
            |out, &v, m, s| {
                let d = f64::from(v) - m;
                *out = d as f32;
                *s += d * d;
            },
        );
    }
    square.iter_mut().for_each(|s| *s = (*s / (t - 1) as f64).sqrt());
    (out, square)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    #[test]
    fn correlation_matches_hand_values() {
        let x = array![[1.0, 5.0, 0.0], [2.0, 5.0, 1.0], [3.0, 5.0, 0.0]];
        let y = array![[-2.0], [-4.0], [-6.0]];
        let c = correlation(x.view(), y.view(), &Cpu::new()).unwrap();
        approx::assert_abs_diff_eq!(c, array![[-1.0], [0.0], [0.0]], epsilon = 1e-6);
    }

    #[test]
    fn one_row_correlates_with_nothing_and_misfits_are_errors() {
        let x = array![[1.0, 2.0]];
        assert_eq!(
            correlation(x.view(), x.view(), &Cpu::new()).unwrap(),
            array![[0.0, 0.0], [0.0, 0.0]]
        );
        let y = array![[1.0], [2.0]];
        assert!(correlation(x.view(), y.view(), &Cpu::new()).is_err());
    }
}
