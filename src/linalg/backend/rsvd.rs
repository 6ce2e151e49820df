//! The randomised SVD: subspace iteration from a random start, until it has converged.

use ndarray::{Array2, ArrayView2};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::bridge::check_finite;
use super::linalg_backend::LinalgBackend;
use super::svd::Svd;
use super::truncated::{from_subspace, gram_svd};
use crate::error::{Error, Result};
use crate::linalg::device::compute::Compute;

/// Settings of the subspace iteration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Randomized {
    /// Columns of the subspace beyond the rank, at least; it has twice the rank when that is more.
    pub oversampling: usize,
    /// How far the residual may lie above the optimum, as a share of the optimum.
    pub tolerance: f64,
    /// Products with the matrix, or its transpose, before it gives up.
    pub products: usize,
}

impl Default for Randomized {
    /// 16 more columns, half a percent above the optimum, 12 products.
    fn default() -> Self {
        Self { oversampling: 16, tolerance: 5e-3, products: 12 }
    }
}

/// The result of the iteration, and its accuracy.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomizedSvd {
    /// The leading triplets.
    pub svd: Svd,
    /// `‖A − U diag(s) Vᵀ‖_F`, from norms: `√(‖A‖² − Σ s²)`.
    pub residual: f64,
    /// Estimate of `residual / optimum − 1`; 0 when the exact method answered.
    pub excess: f64,
    /// Products with `A` or `Aᵀ` that it took.
    pub products: usize,
    /// Whether the tolerance was missed, so that the exact method answered.
    pub fell_back: bool,
}

/// Residuals below this share of `‖A‖_F²` drown in the rounding of the captured energy.
const NOISE: f64 = 1e-6;

/// The `rank` leading triplets of `A: (m, n)` by randomised subspace iteration (Halko, Martinsson
/// and Tropp 2011, Algorithms 4.4 and 5.1), with a stopping rule and a fallback.
///
/// A random `(n, l)` start is multiplied by `A` and `Aᵀ` in turn and orthonormalised by QR after
/// every product. The energy that the best `rank` directions of the subspace capture,
/// `E = Σ_{i ≤ rank} s_i²`, rises to its maximum; the residual is `‖A‖² − E` exactly. What is still
/// to come is extrapolated from the last two gains as a geometric series, by the root of their
/// ratio (at least ½) since a nearly flat spectrum makes the gains fall ever more slowly, and the
/// iteration ends when the residual would fall by less than the tolerance. The extrapolation is an
/// estimate, not a bound: singular values that agree to many digits can slow the series.
///
/// The exact method (the Gram matrix in `f64`) answers when the tolerance is missed, when the
/// subspace would be as wide as the matrix, and when the residual is below a thousandth of
/// `‖A‖`, which norms in `f32` cannot resolve.
///
/// Cost: `2 m n l` operations a product, four to eight of them, through [`Compute::gemm`] or, on a
/// device with a memory of its own,
/// [`DeviceMatrix::multiply`](crate::linalg::DeviceMatrix::multiply); `4 (m + n) l²` for QR on one
/// thread. Memory: `3 (m + n) l` numbers beside `A`.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a rank above `min(m, n)` or a
/// tolerance that is not positive, [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a
/// NaN or infinity.
pub fn rsvd(
    a: ArrayView2<'_, f32>,
    rank: usize,
    how: &Randomized,
    seed: u64,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<RandomizedSvd> {
    let (m, n) = a.dim();
    if rank > m.min(n) {
        return Err(Error::range("rank", format!("at most {}", m.min(n)), rank));
    }
    if how.tolerance.is_nan() || how.tolerance <= 0.0 {
        return Err(Error::range("tolerance of a randomised SVD", "above 0", how.tolerance));
    }
    check_finite("matrix of an SVD", a)?;
    let resident = compute.upload(a)?;
    let total: f64 = match &resident {
        Some(resident) => resident.row_squares()?.iter().sum(),
        None => a.iter().map(|&x| f64::from(x).powi(2)).sum(),
    };
    let width = rank + how.oversampling.max(rank);
    if rank == 0 || total == 0.0 || width >= m.min(n) {
        return exact(a, rank, total, 0, compute, backend);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut basis = Array2::from_shape_simple_fn((n, width), || rng.random_range(-1.0f32..1.0));
    let mut energies: Vec<f64> = Vec::new();
    let mut forward = true;
    for products in 1..=how.products {
        let side = if forward { a } else { a.reversed_axes() };
        let mut product = Array2::zeros((side.nrows(), width));
        match &resident {
            Some(resident) => resident.multiply(!forward, basis.view(), product.view_mut())?,
            None => compute.gemm(1.0, side, basis.view(), 0.0, product.view_mut())?,
        }
        if products > 1 {
            energies.push(captured(product.view(), rank, compute, backend)?);
        }
        let excess = excess(&energies, total);
        if excess.is_some_and(|excess| excess <= how.tolerance) {
            let svd = from_subspace(product.view(), basis.view(), rank, compute, backend)?;
            let svd = if forward { svd } else { svd.transposed() };
            let residual = residual(&svd, total);
            let excess = excess.unwrap_or(0.0);
            return Ok(RandomizedSvd { svd, residual, excess, products, fell_back: false });
        }
        basis = backend.qr(product.view())?.q;
        forward = !forward;
    }
    exact(a, rank, total, how.products, compute, backend)
}

/// `Σ_{i ≤ rank} s_i²` of the product of a matrix with an orthonormal basis.
fn captured(
    product: ArrayView2<'_, f32>,
    rank: usize,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<f64> {
    let mut gram = Array2::zeros((product.ncols(), product.ncols()));
    compute.add_gram(product, &mut gram)?;
    Ok(backend.eigenvalues(gram.view())?.iter().take(rank).sum())
}

/// The estimated excess over the optimum, when there are enough gains to tell.
fn excess(energies: &[f64], total: f64) -> Option<f64> {
    let [.., first, second, third] = *energies else { return None };
    let residual = total - third;
    if residual <= NOISE * total {
        return None;
    }
    let (before, last) = (second - first, (third - second).max(0.0));
    let ratio = if before > 0.0 { (last / before).max(0.5).sqrt() } else { 0.5 };
    if ratio >= 1.0 {
        return None;
    }
    let optimum = residual - last * ratio / (1.0 - ratio);
    (optimum > 0.0).then(|| (residual / optimum).sqrt() - 1.0)
}

fn residual(svd: &Svd, total: f64) -> f64 {
    let captured: f64 = svd.s.iter().map(|&s| f64::from(s).powi(2)).sum();
    (total - captured).max(0.0).sqrt()
}

fn exact(
    a: ArrayView2<'_, f32>,
    rank: usize,
    total: f64,
    products: usize,
    compute: &dyn Compute,
    backend: &dyn LinalgBackend,
) -> Result<RandomizedSvd> {
    let svd = gram_svd(a, rank, compute, backend)?;
    let residual = residual(&svd, total);
    Ok(RandomizedSvd { svd, residual, excess: 0.0, products, fell_back: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::singular_values;
    use crate::linalg::{Cpu, PureRust};

    fn flat(m: usize, n: usize) -> Array2<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
    }

    fn optimum(a: &Array2<f32>, rank: usize) -> f64 {
        let sigma = singular_values(a.view()).unwrap();
        sigma[rank..].iter().map(|&s| f64::from(s).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn a_flat_spectrum_the_hardest_one_stays_within_the_tolerance() {
        for (m, n, rank) in [(500, 300, 8), (300, 500, 32), (256, 256, 1)] {
            let a = flat(m, n);
            let best = optimum(&a, rank);
            for tolerance in [1e-2, 1e-3] {
                let how = Randomized { tolerance, products: 40, ..Randomized::default() };
                let found = rsvd(a.view(), rank, &how, 3, &Cpu::new(), &PureRust).unwrap();
                assert!(!found.fell_back, "{m} {n} {rank} {tolerance}");
                let error = &a - &found.svd.product(&Cpu::new()).unwrap();
                let true_residual = error.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>().sqrt();
                assert!((found.residual / true_residual - 1.0).abs() < 1e-5);
                assert!(found.residual <= best * (1.0 + tolerance), "{} {best}", found.residual);
                assert!(found.excess <= tolerance && found.products >= 4);
            }
        }
    }

    #[test]
    fn it_falls_back_when_the_tolerance_is_missed_or_cannot_be_seen() {
        let a = flat(200, 160);
        let hurried = Randomized { tolerance: 1e-9, products: 4, ..Randomized::default() };
        let found = rsvd(a.view(), 10, &hurried, 3, &Cpu::new(), &PureRust).unwrap();
        assert!(found.fell_back && found.products == 4);
        assert!(found.residual <= optimum(&a, 10) * (1.0 + 1e-5));
        let low = flat(200, 5).dot(&flat(5, 160));
        let found = rsvd(low.view(), 5, &Randomized::default(), 3, &Cpu::new(), &PureRust).unwrap();
        assert!(found.fell_back);
        let error = &low - &found.svd.product(&Cpu::new()).unwrap();
        assert!(error.iter().all(|e| e.abs() < 2e-5));
    }

    #[test]
    fn the_seed_decides_the_bits_and_the_threads_do_not() {
        let a = flat(700, 560);
        let run = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let how = Randomized::default();
            pool.install(|| rsvd(a.view(), 6, &how, seed, &Cpu::new(), &PureRust)).unwrap()
        };
        assert_eq!(run(1, 1), run(4, 1));
        assert_ne!(run(1, 1).svd, run(1, 2).svd);
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        let how = Randomized { tolerance: f64::NAN, ..Randomized::default() };
        assert!(rsvd(flat(4, 4).view(), 1, &how, 0, &Cpu::new(), &PureRust).is_err());
        assert!(
            rsvd(flat(4, 4).view(), 5, &Randomized::default(), 0, &Cpu::new(), &PureRust).is_err()
        );
    }
}
