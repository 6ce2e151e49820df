//! Factors, and solves with, a symmetric positive definite matrix, by Cholesky in `f64`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::{factor, solve};
use faer::{Conj, Mat, Par};
use ndarray::{Array2, ArrayView2};

use super::bridge::{to_array, to_faer};
use crate::error::{Error, ErrorKind, Result};

/// The lower Cholesky factor `L` of a symmetric positive definite `G = L Lᵀ: (n, n)`, of which only
/// the lower triangle is read; zeros above the diagonal. `n³/3` operations on one thread.
///
/// # Errors
/// [`ErrorKind::Shape`] unless `G` is square; [`ErrorKind::Numerical`] when it is not positive
/// definite.
pub fn cholesky(gram: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let n = gram.nrows();
    if gram.dim() != (n, n) {
        return Err(Error::shape("Cholesky factorisation", (n, n), gram.dim()));
    }
    let lower = factorise(gram)?;
    let entry = |(i, j)| if i >= j { lower[(i, j)] } else { 0.0 };
    Ok(Array2::from_shape_fn((n, n), entry))
}

/// Solves `G X = B` for a symmetric positive definite `G: (n, n)` and `B: (n, m)`: `X: (n, m)`.
///
/// `G = L Lᵀ`, then two triangular solves; only the lower triangle of `G` is read. `n³/3 + 2 n² m`
/// operations on one thread, so the bits do not depend on the number of threads.
///
/// # Errors
/// [`ErrorKind::Shape`] when the shapes do not fit; [`ErrorKind::Numerical`] when `G` is not
/// positive definite or the solution is not finite.
pub fn solve_spd(gram: ArrayView2<'_, f64>, rhs: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let (n, m) = rhs.dim();
    if gram.dim() != (n, n) {
        return Err(Error::shape("Cholesky solve", (n, n), gram.dim()));
    }
    let lower = factorise(gram)?;
    let mut x = to_faer(rhs);
    let scratch = solve::solve_in_place_scratch::<f64>(n, m, Par::Seq);
    solve::solve_in_place_with_conj(
        lower.as_ref(),
        Conj::No,
        x.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    let x = to_array(x.as_ref());
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => Err(failure("the solution is not finite".into())),
    }
}

/// The factor in the lower triangle of the result; what is above it is not specified.
fn factorise(gram: ArrayView2<'_, f64>) -> Result<Mat<f64>> {
    let n = gram.nrows();
    let mut lower = to_faer(gram);
    let scratch = factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    factor::cholesky_in_place(
        lower.as_mut(),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|e| failure(format!("the matrix is not positive definite ({e:?})")))?;
    Ok(lower)
}

fn failure(reason: String) -> Error {
    ErrorKind::Numerical { operation: "Cholesky solve", reason }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_solution_satisfies_the_equations() {
        let n = 70;
        let value = |(i, j)| ((i * 7919 + j * 104_729) % 1013) as f64 / 506.5 - 1.0;
        let a = Array2::from_shape_fn((n + 5, n), value);
        let gram = a.t().dot(&a) + Array2::<f64>::eye(n);
        let rhs = Array2::from_shape_fn((n, 3), value);
        let x = solve_spd(gram.view(), rhs.view()).unwrap();
        let scale = gram.iter().chain(&x).fold(0.0f64, |m, v| m.max(v.abs()));
        let error = (gram.dot(&x) - rhs).mapv(f64::abs);
        let tolerance = f64::EPSILON * (n * n) as f64 * scale;
        assert!(error.iter().all(|&e| e <= tolerance), "{error}");
    }

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        let gram = array![[4.0, f64::NAN], [2.0, 5.0]];
        assert_eq!(cholesky(gram.view()).unwrap(), array![[2.0, 0.0], [1.0, 2.0]]);
        assert!(cholesky(Array2::zeros((2, 3)).view()).is_err());
    }

    #[test]
    fn only_the_lower_triangle_is_read() {
        let x = solve_spd(array![[4.0, f64::NAN], [0.0, 4.0]].view(), array![[8.0], [4.0]].view());
        assert_eq!(x.unwrap(), array![[2.0], [1.0]]);
    }

    #[test]
    fn indefinite_and_misfitting_matrices_are_errors() {
        let rhs = array![[1.0], [1.0]];
        for bad in [[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[f64::NAN, 0.], [0., 1.]]]
        {
            let error = solve_spd(ndarray::arr2(&bad).view(), rhs.view()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Numerical { .. }), "{error}");
        }
        assert!(solve_spd(array![[1.0]].view(), rhs.view()).is_err());
        assert_eq!(
            solve_spd(Array2::eye(0).view(), Array2::zeros((0, 2)).view()).unwrap().len(),
            0
        );
    }
}
