//! The truncated SVD, by the algorithm that is cheapest at the wanted accuracy.

use ndarray::{Array2, ArrayView2, s};
use serde::{Deserialize, Serialize};

use super::bridge::check_finite;
use super::linalg_backend::LinalgBackend;
use super::rsvd::{Randomized, rsvd};
use super::svd::Svd;
use crate::error::{Error, Result};
use crate::linalg::device::compute::Compute;

/// The algorithm of a truncated SVD.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SvdMethod {
    /// [`SvdMethod::Full`] on small matrices and nearly full ranks, [`SvdMethod::Randomized`] up to
    /// an eighth of the short side, else [`SvdMethod::Gram`].
    #[default]
    Auto,
    /// All triplets, then the leading ones: [`LinalgBackend::svd`].
    Full,
    /// Eigenvectors of the Gram matrix of the short side, formed in `f64`. The projection on them
    /// is the best approximation to 1e-6 of its residual; two to three times as fast as `Full`.
    Gram,
    /// Subspace iteration: [`rsvd`], which answers by `Gram` when it misses its tolerance.
    Randomized(Randomized),
}

/// Short sides up to this are decomposed in full: it takes milliseconds.
const SMALL: usize = 128;

/// The `rank` leading singular triplets of `A: (m, n)`, best in the Frobenius norm among all
/// matrices of that rank (Eckart and Young 1936), to the accuracy of the method.
///
/// Cost, with `short` and `long` for the sides: `Full` `4 long short² + 22 short³`; `Gram`
/// `2 long short²` in `f64` and `9 short³`; `Randomized` about `16 m n rank`. `seed` is read by
/// `Randomized` alone. The bits depend neither on the threads nor on anything but the arguments.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a rank above `min(m, n)`,
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity,
/// [`ErrorKind::Numerical`](crate::ErrorKind::Numerical) when an iteration does not converge.
pub fn truncated_svd(
    a: ArrayView2<'_, f32>,
    rank: usize,
    method: SvdMethod,
    seed: u64,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<Svd> {
    let short = a.nrows().min(a.ncols());
    if rank > short {
        return Err(Error::range("rank", format!("at most {short}"), rank));
    }
    match method.resolved(short, rank) {
        SvdMethod::Gram => gram_svd(a, rank, compute, backend),
        SvdMethod::Randomized(how) => Ok(rsvd(a, rank, &how, seed, compute, backend)?.svd),
        SvdMethod::Auto | SvdMethod::Full => Ok(backend.svd(a)?.truncated(rank)),
    }
}

impl SvdMethod {
    fn resolved(self, short: usize, rank: usize) -> Self {
        match self {
            Self::Auto if short <= SMALL || 4 * rank >= 3 * short => Self::Full,
            Self::Auto if 8 * rank <= short => Self::Randomized(Randomized::default()),
            Self::Auto => Self::Gram,
            chosen => chosen,
        }
    }
}

/// The leading triplets from the eigenvectors of the short side's Gram matrix.
pub(super) fn gram_svd(
    a: ArrayView2<'_, f32>,
    rank: usize,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<Svd> {
    check_finite("matrix of an SVD", a)?;
    let tall = a.nrows() >= a.ncols();
    let a_tall = if tall { a } else { a.reversed_axes() };
    let n = a_tall.ncols();
    let mut gram = Array2::zeros((n, n));
    compute.add_gram(a_tall, &mut gram)?;
    let vectors = backend.eigh(gram.view())?.vectors;
    drop(gram);
    let basis = vectors.slice(s![.., ..rank]).mapv(|x| x as f32);
    let mut product = Array2::zeros((a_tall.nrows(), rank));
    compute.gemm(1.0, a_tall, basis.view(), 0.0, product.view_mut())?;
    let svd = from_subspace(product.view(), basis.view(), rank, compute, backend)?;
    Ok(if tall { svd } else { svd.transposed() })
}

/// The `rank` leading triplets of `product · basisᵀ`, the projection of a matrix `A` on the space
/// of `basis: (n, l)`, whose columns are orthonormal; `product: (m, l)` is `A basis`.
///
/// Going through an SVD of the product keeps the left vectors orthonormal where `A v / σ` would
/// lose them to a small `σ`.
pub(super) fn from_subspace(
    product: ArrayView2<'_, f32>,
    basis: ArrayView2<'_, f32>,
    rank: usize,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<Svd> {
    let inner = backend.svd(product)?.truncated(rank);
    let mut vt = Array2::zeros((inner.s.len(), basis.nrows()));
    compute.gemm(1.0, inner.vt.view(), basis.t(), 0.0, vt.view_mut())?;
    Ok(Svd { u: inner.u, s: inner.s, vt })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{Cpu, PureRust, qr};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn matrix(m: usize, n: usize, seed: u64) -> Array2<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
    }

    /// Orthonormal vectors and singular values `(i + 1)^-½`, the decay of trained weights.
    fn decaying(m: usize, n: usize) -> (Array2<f32>, Vec<f64>) {
        let k = m.min(n);
        let (mut u, v) =
            (qr(matrix(m, k, 1).view()).unwrap().q, qr(matrix(n, k, 2).view()).unwrap().q);
        let sigma: Vec<f64> = (0..k).map(|i| ((i + 1) as f64).powf(-0.5)).collect();
        for (mut column, s) in u.columns_mut().into_iter().zip(&sigma) {
            column *= *s as f32;
        }
        (u.dot(&v.t()), sigma)
    }

    fn residual(a: &Array2<f32>, svd: &Svd) -> f64 {
        let error = a - &svd.product(&Cpu::new()).unwrap();
        error.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn every_method_reaches_the_optimum_of_eckart_and_young() {
        for (m, n) in [(330, 200), (200, 330), (150, 150)] {
            let (a, sigma) = decaying(m, n);
            for rank in [1, 17, 100, m.min(n)] {
                let best = sigma[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
                let methods = [
                    (SvdMethod::Full, 1e-5),
                    (SvdMethod::Gram, 1e-5),
                    (SvdMethod::Auto, 5e-3),
                    (SvdMethod::Randomized(Randomized::default()), 5e-3),
                ];
                for (method, excess) in methods {
                    let f =
                        truncated_svd(a.view(), rank, method, 7, &Cpu::new(), &PureRust).unwrap();
                    assert_eq!((f.u.dim(), f.vt.dim()), ((m, rank), (rank, n)));
                    let found = residual(&a, &f);
                    assert!(
                        found <= best * (1.0 + excess) + 1e-4,
                        "{method:?} {rank}: {found} {best}"
                    );
                    let ortho = f.u.t().dot(&f.u) - Array2::<f32>::eye(rank);
                    assert!(ortho.iter().all(|e| e.abs() < 5e-5), "{method:?} {rank}");
                }
            }
        }
    }

    #[test]
    fn bad_input_is_refused_by_every_method() {
        let mut a = matrix(20, 9, 3);
        let methods = [
            SvdMethod::Auto,
            SvdMethod::Full,
            SvdMethod::Gram,
            SvdMethod::Randomized(Randomized::default()),
        ];
        for method in methods {
            let error = truncated_svd(a.view(), 10, method, 0, &Cpu::new(), &PureRust).unwrap_err();
            assert!(error.to_string().contains("rank: expected at most 9, found 10"), "{error}");
        }
        a[[3, 4]] = f32::NAN;
        for method in methods {
            assert!(
                truncated_svd(a.view(), 2, method, 0, &Cpu::new(), &PureRust).is_err(),
                "{method:?}"
            );
        }
    }

    #[test]
    fn rank_zero_and_zero_matrices_are_decomposed() {
        for method in
            [SvdMethod::Full, SvdMethod::Gram, SvdMethod::Randomized(Randomized::default())]
        {
            let f = truncated_svd(matrix(20, 9, 3).view(), 0, method, 0, &Cpu::new(), &PureRust)
                .unwrap();
            assert_eq!((f.u.dim(), f.vt.dim()), ((20, 0), (0, 9)));
            let zero = Array2::zeros((150, 140));
            let f = truncated_svd(zero.view(), 3, method, 0, &Cpu::new(), &PureRust).unwrap();
            assert_eq!((residual(&zero, &f), f.s), (0.0, vec![0.0; 3]));
        }
    }
}
