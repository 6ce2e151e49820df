//! Solves with a lower triangular matrix in `f64`: division by a Cholesky factor, since its
//! inverse is never formed.

use faer::Par;
use faer::linalg::triangular_solve as solve;
use ndarray::{Array2, ArrayView2};

use super::bridge::{check_finite, to_array, to_faer};
use crate::error::{Error, ErrorKind, Result};
use crate::linalg::registers::with_clean_registers;

/// Solves `L X = B` for a lower triangular `L: (n, n)` and `B: (n, m)`: `X: (n, m)`.
///
/// Only the lower triangle of `L` is read. `n² m` operations on one thread.
///
/// # Errors
/// [`ErrorKind::Shape`] when the shapes do not fit; [`ErrorKind::NotFinite`] for a `B` that is
/// not finite; [`ErrorKind::Numerical`] for a zero on the diagonal or a solution that overflows.
pub fn solve_lower(lower: ArrayView2<'_, f64>, rhs: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    solve_with(lower, rhs, false)
}

/// Solves `Lᵀ X = B`; as [`solve_lower`].
///
/// # Errors
/// As [`solve_lower`].
pub fn solve_lower_transposed(
    lower: ArrayView2<'_, f64>,
    rhs: ArrayView2<'_, f64>,
) -> Result<Array2<f64>> {
    solve_with(lower, rhs, true)
}

fn solve_with(
    lower: ArrayView2<'_, f64>,
    rhs: ArrayView2<'_, f64>,
    transposed: bool,
) -> Result<Array2<f64>> {
    let n = rhs.nrows();
    if lower.dim() != (n, n) {
        return Err(Error::shape("triangular solve", (n, n), lower.dim()));
    }
    check_finite("right-hand side of a triangular solve", rhs)?;
    if let Some(i) = (0..n).find(|&i| lower[[i, i]] == 0.0) {
        return Err(failure(format!("entry {i} of the diagonal is 0")));
    }
    let (factor, mut x) = (to_faer(lower), to_faer(rhs));
    with_clean_registers(|| match transposed {
        true => solve::solve_upper_triangular_in_place(factor.transpose(), x.as_mut(), Par::Seq),
        false => solve::solve_lower_triangular_in_place(factor.as_ref(), x.as_mut(), Par::Seq),
    });
    let x = to_array(x.as_ref());
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => Err(failure("the solution is not finite".into())),
    }
}

fn failure(reason: String) -> Error {
    ErrorKind::Numerical { operation: "triangular solve", reason }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn hand_cases_in_both_directions() {
        // The upper triangle is never read.
        let lower = array![[2.0, f64::NAN], [1.0, 4.0]];
        let rhs = array![[2.0], [9.0]];
        assert_eq!(solve_lower(lower.view(), rhs.view()).unwrap(), array![[1.0], [2.0]]);
        let rhs = array![[4.0], [8.0]];
        assert_eq!(solve_lower_transposed(lower.view(), rhs.view()).unwrap(), array![[1.0], [2.0]]);
    }

    #[test]
    fn larger_systems_satisfy_their_equations() {
        let n = 90;
        let value = |(i, j): (usize, usize)| ((i * 31 + j * 17) % 23) as f64 / 23.0;
        let lower = Array2::from_shape_fn((n, n), |(i, j)| match i.cmp(&j) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => n as f64,
            std::cmp::Ordering::Greater => value((i, j)),
        });
        let rhs = Array2::from_shape_fn((n, 5), value);
        let down = solve_lower(lower.view(), rhs.view()).unwrap();
        let up = solve_lower_transposed(lower.view(), rhs.view()).unwrap();
        approx::assert_abs_diff_eq!(lower.dot(&down), rhs, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(lower.t().dot(&up), rhs, epsilon = 1e-12);
    }

    #[test]
    fn singular_and_misfitting_systems_are_errors() {
        let rhs = array![[1.0], [1.0]];
        let singular = solve_lower(array![[1.0, 0.0], [1.0, 0.0]].view(), rhs.view()).unwrap_err();
        assert!(matches!(singular.kind(), ErrorKind::Numerical { .. }), "{singular}");
        assert!(solve_lower(array![[1.0]].view(), rhs.view()).is_err());
        assert!(solve_lower(array![[1.0]].view(), array![[f64::NAN]].view()).is_err());
    }
}
