//! Eigenvalues and eigenvectors of a symmetric matrix, in `f64`.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{self, ComputeEigenvectors};
use faer::{Mat, Par};
use ndarray::{Array2, ArrayView2};

use super::bridge::{check_finite, to_array, to_faer};
use crate::error::{Error, ErrorKind, Result};
use crate::linalg::registers::with_clean_registers;

/// An eigendecomposition `A = V diag(values) Vᵀ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigh {
    /// The `n` eigenvalues, largest first (as singular values are, unlike LAPACK's order).
    pub values: Vec<f64>,
    /// `V: (n, n)`, orthonormal; column `i` belongs to `values[i]`.
    pub vectors: Array2<f64>,
}

/// The eigendecomposition of a symmetric `A: (n, n)`, of which the lower triangle is read.
///
/// About `9 n³` operations on one thread, so the bits do not depend on the number of threads.
///
/// # Errors
/// [`ErrorKind::Shape`] unless `A` is square; [`ErrorKind::NotFinite`] for a NaN or infinity in
/// any part of it; [`ErrorKind::Numerical`] when the iteration does not converge.
pub fn eigh(a: ArrayView2<'_, f64>) -> Result<Eigh> {
    let n = check(a)?;
    let mut vectors = Mat::<f64>::zeros(n, n);
    let mut values = factor(a, Some(&mut vectors))?;
    values.reverse();
    Ok(Eigh { values, vectors: to_array(vectors.as_ref().reverse_cols()) })
}

/// The eigenvalues of a symmetric matrix alone, largest first.
///
/// # Errors
/// As [`eigh`].
pub fn eigenvalues(a: ArrayView2<'_, f64>) -> Result<Vec<f64>> {
    check(a)?;
    let mut values = factor(a, None)?;
    values.reverse();
    Ok(values)
}

fn check(a: ArrayView2<'_, f64>) -> Result<usize> {
    let n = a.nrows();
    if a.dim() != (n, n) {
        return Err(Error::shape("symmetric eigenvalues", (n, n), a.dim()));
    }
    // Of a NaN the eigenvalue iteration makes eigenvalues, without complaint.
    check_finite("symmetric matrix", a)?;
    Ok(n)
}

fn factor(a: ArrayView2<'_, f64>, vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>> {
    let n = a.nrows();
    if n == 0 {
        return Ok(Vec::new());
    }
    let mode = if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
    let scratch = evd::self_adjoint_evd_scratch::<f64>(n, mode, Par::Seq, Default::default());
    let mut values = Diag::<f64>::zeros(n);
    let (a, vectors) = (to_faer(a), vectors.map(|v| v.as_mut()));
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    with_clean_registers(|| {
        let (a, values) = (a.as_ref(), values.as_mut());
        evd::self_adjoint_evd(a, values, vectors, Par::Seq, stack, Default::default())
    })
    .map_err(|e| ErrorKind::Numerical {
        operation: "symmetric eigenvalues",
        reason: format!("{e:?}"),
    })?;
    Ok(values.column_vector().iter().copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_product_is_the_matrix() {
        for n in [1, 2, 7, 60] {
            let a = Array2::from_shape_fn((n, n), |(i, j)| ((i * j + i + j) % 17) as f64 - 8.0);
            let e = eigh(a.view()).unwrap();
            let scaled = &e.vectors * &ndarray::aview1(&e.values);
            let error = (scaled.dot(&e.vectors.t()) - &a).mapv(f64::abs);
            assert!(error.iter().all(|&e| e < 1e-12 * (8 * n) as f64), "{error}");
            assert!(e.values.windows(2).all(|w| w[0] >= w[1]));
            approx::assert_abs_diff_eq!(
                eigenvalues(a.view()).unwrap()[..],
                e.values[..],
                epsilon = 1e-11
            );
        }
    }

    #[test]
    fn known_values_and_bad_input() {
        let a = array![[2.0, f64::MAX], [1.0, 2.0]];
        approx::assert_abs_diff_eq!(
            eigh(a.view()).unwrap().values[..],
            [3.0, 1.0],
            epsilon = 1e-14
        );
        assert!(eigh(Array2::zeros((2, 3)).view()).is_err());
        let nan = eigh(array![[1.0, f64::NAN], [0.0, 1.0]].view()).unwrap_err();
        assert!(matches!(nan.kind(), ErrorKind::NotFinite { .. }), "{nan}");
        assert!(eigh(Array2::zeros((0, 0)).view()).unwrap().values.is_empty());
    }
}
