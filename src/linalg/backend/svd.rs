//! The thin singular value decomposition in `f32`.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{self as faer_svd, ComputeSvdVectors};
use faer::{Mat, Par};
use ndarray::{Array2, ArrayView2, Axis, s};

use super::bridge::{check_finite, to_array, to_faer};
use crate::error::{Error, ErrorKind, Result};
use crate::linalg::device::compute::Compute;
use crate::linalg::registers::with_clean_registers;

/// A singular value decomposition `A = U diag(s) Vᵀ`, complete or truncated.
///
/// Singular vectors are unique up to a common sign only: compare products, never factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// `U: (m, k)`, orthonormal columns.
    pub u: Array2<f32>,
    /// The `k` singular values, none negative, largest first.
    pub s: Vec<f32>,
    /// `Vᵀ: (k, n)`, orthonormal rows.
    pub vt: Array2<f32>,
}

impl Svd {
    /// The leading `rank` triplets; all of them when there are fewer.
    #[must_use]
    pub fn truncated(mut self, rank: usize) -> Self {
        let rank = rank.min(self.s.len());
        self.s.truncate(rank);
        self.u = self.u.slice(s![.., ..rank]).to_owned();
        self.vt = self.vt.slice(s![..rank, ..]).to_owned();
        self
    }

    /// The decomposition of the transpose.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { u: self.vt.reversed_axes(), s: self.s, vt: self.u.reversed_axes() }
    }

    /// `L = U diag(s)^½: (m, k)` and `R = diag(s)^½ Vᵀ: (k, n)`, so that `L R` is the matrix and
    /// both factors are of one size.
    pub fn into_balanced(mut self) -> (Array2<f32>, Array2<f32>) {
        for (i, s) in self.s.iter().enumerate() {
            let root = s.sqrt();
            self.u.index_axis_mut(Axis(1), i).mapv_inplace(|x| x * root);
            self.vt.index_axis_mut(Axis(0), i).mapv_inplace(|x| x * root);
        }
        (self.u, self.vt)
    }

    /// `U diag(s) Vᵀ: (m, n)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the parts were changed so that they no longer fit.
    pub fn product(&self, compute: &dyn Compute) -> Result<Array2<f32>> {
        if self.u.ncols() != self.s.len() {
            return Err(Error::shape("singular values", self.u.ncols(), self.s.len()));
        }
        let mut scaled = self.u.clone();
        for (mut column, s) in scaled.columns_mut().into_iter().zip(&self.s) {
            column *= *s;
        }
        let mut out = Array2::zeros((self.u.nrows(), self.vt.ncols()));
        compute.gemm(1.0, scaled.view(), self.vt.view(), 0.0, out.view_mut())?;
        Ok(out)
    }
}

/// The thin SVD of `A: (m, n)` with `k = min(m, n)` triplets.
///
/// Divide and conquer, about `4 m n k + 22 k³` operations on one thread, so the bits do not depend
/// on the number of threads. Run one matrix a task to use them all. Memory: four times `A`.
///
/// # Errors
/// [`ErrorKind::NotFinite`] for a NaN or infinity; [`ErrorKind::Numerical`] when the iteration
/// does not converge.
pub fn svd(a: ArrayView2<'_, f32>) -> Result<Svd> {
    check_finite("matrix of an SVD", a)?;
    let (m, n) = a.dim();
    let k = m.min(n);
    let mut u = Mat::<f32>::zeros(m, k);
    let mut v = Mat::<f32>::zeros(n, k);
    let values = factor(a, Some((&mut u, &mut v)))?;
    Ok(Svd { u: to_array(u.as_ref()), s: values, vt: to_array(v.transpose()) })
}

/// The singular values of `A: (m, n)` alone, largest first, at about a third of the cost.
///
/// # Errors
/// As [`svd`].
pub fn singular_values(a: ArrayView2<'_, f32>) -> Result<Vec<f32>> {
    check_finite("matrix of an SVD", a)?;
    factor(a, None)
}

fn factor(
    a: ArrayView2<'_, f32>,
    vectors: Option<(&mut Mat<f32>, &mut Mat<f32>)>,
) -> Result<Vec<f32>> {
    let (m, n) = a.dim();
    if m == 0 || n == 0 {
        return Ok(Vec::new());
    }
    let mode = if vectors.is_some() { ComputeSvdVectors::Thin } else { ComputeSvdVectors::No };
    let scratch = faer_svd::svd_scratch::<f32>(m, n, mode, mode, Par::Seq, Default::default());
    let mut values = Diag::<f32>::zeros(m.min(n));
    let (u, v) = vectors.map_or((None, None), |(u, v)| (Some(u.as_mut()), Some(v.as_mut())));
    let (a, mut memory) = (to_faer(a), MemBuffer::new(scratch));
    let stack = MemStack::new(&mut memory);
    with_clean_registers(|| {
        faer_svd::svd(a.as_ref(), values.as_mut(), u, v, Par::Seq, stack, Default::default())
    })
    .map_err(|e| ErrorKind::Numerical { operation: "SVD", reason: format!("{e:?}") })?;
    Ok(values.column_vector().iter().map(|s| s.max(0.0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    fn matrix(m: usize, n: usize) -> Array2<f32> {
        Array2::from_shape_fn((m, n), |(i, j)| {
            ((i * 7919 + j * 104_729) % 1013) as f32 / 506.5 - 1.
        })
    }

    #[test]
    fn the_product_is_the_matrix_and_the_vectors_are_orthonormal() {
        for (m, n) in [(1, 1), (5, 9), (9, 5), (200, 40), (40, 200), (130, 130)] {
            let a = matrix(m, n);
            let f = svd(a.view()).unwrap();
            let k = m.min(n);
            assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((m, k), k, (k, n)));
            assert!(f.s.windows(2).all(|w| w[0] >= w[1]) && f.s[k - 1] >= 0.0);
            let close = |a: &Array2<f32>, b: &Array2<f32>, scale: f32| {
                (a - b).iter().all(|e| e.abs() <= 1e-5 * scale)
            };
            assert!(close(&f.product(&Cpu::new()).unwrap(), &a, f.s[0].max(1.0)), "{m}x{n}");
            assert!(close(&f.u.t().dot(&f.u), &Array2::eye(k), 1.0));
            assert!(close(&f.vt.dot(&f.vt.t()), &Array2::eye(k), 1.0));
            let (left, right) = f.clone().into_balanced();
            assert!(close(&left.dot(&right), &a, f.s[0].max(1.0)));
            let alone = singular_values(a.view()).unwrap();
            assert!(alone.iter().zip(&f.s).all(|(a, b)| (a - b).abs() <= 2e-6 * f.s[0]));
        }
    }

    #[test]
    fn known_singular_values() {
        let f = svd(array![[0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]].view()).unwrap();
        approx::assert_abs_diff_eq!(f.s[..], [3.0, 2.0], epsilon = 1e-6);
        assert_eq!(f.truncated(1).s.len(), 1);
        assert_eq!(svd(Array2::zeros((3, 2)).view()).unwrap().s, [0.0, 0.0]);
        assert!(svd(Array2::zeros((0, 4)).view()).unwrap().s.is_empty());
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let a = array![[1.0, 2.0], [bad, 4.0]];
            for error in [svd(a.view()).unwrap_err(), singular_values(a.view()).unwrap_err()] {
                assert!(matches!(error.kind(), ErrorKind::NotFinite { index: 2, .. }), "{error}");
            }
        }
    }
}
