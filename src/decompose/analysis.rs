//! How compressible a matrix is, and how that changes.

use ndarray::{Array2, ArrayView2};

use crate::error::Result;
use crate::linalg::{Randomized, rsvd};
use crate::model::Finite;
use crate::stage::Context;

/// Short sides up to this have all eigenvalues of their Gram matrix computed.
const EXACT: usize = 512;

/// The stable rank `‖W‖_F² / ‖W‖₂²`: between 1 and the rank, 0 for a zero matrix. Small values
/// mean that few directions hold the energy.
///
/// `‖W‖₂` comes from the eigenvalues of the Gram matrix in `f64`; on matrices with a short side
/// above 512, from subspace iteration until its square is good to about 0.1 % of itself at a
/// stable rank of 1000, by the seed of the context.
///
/// Source: the paper's measure of how merging makes experts compressible; its code adds 1e-7 to
/// the denominator.
///
/// # Errors
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity.
pub fn stable_rank(weight: ArrayView2<'_, f32>, cx: &Context) -> Result<f64> {
    weight.check_finite("matrix of a stable rank")?;
    let total: f64 = weight.iter().map(|&x| f64::from(x).powi(2)).sum();
    if total == 0.0 {
        return Ok(0.0);
    }
    let short = weight.nrows().min(weight.ncols());
    let largest = if short <= EXACT {
        squares(weight, cx)?.first().copied().unwrap_or(total)
    } else {
        let how = Randomized { oversampling: 31, tolerance: 5e-7, products: 60 };
        let svd = rsvd(weight, 1, &how, cx.seed(), cx.compute(), cx.backend())?.svd;
        svd.s.first().map_or(total, |&s| f64::from(s).powi(2))
    };
    Ok(total / largest)
}

/// All singular values of a matrix, descending, as roots of the eigenvalues of its Gram matrix in
/// `f64`: below about 1e-8 of the largest they are rounding.
///
/// # Errors
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity.
pub fn spectrum(weight: ArrayView2<'_, f32>, cx: &Context) -> Result<Vec<f64>> {
    weight.check_finite("matrix of a spectrum")?;
    Ok(squares(weight, cx)?.into_iter().map(|square| square.max(0.0).sqrt()).collect())
}

/// The eigenvalues of the smaller Gram matrix, descending.
fn squares(weight: ArrayView2<'_, f32>, cx: &Context) -> Result<Vec<f64>> {
    let short = weight.nrows().min(weight.ncols());
    let tall = if weight.nrows() < weight.ncols() { weight.reversed_axes() } else { weight };
    let mut gram = Array2::zeros((short, short));
    cx.compute().add_gram(tall, &mut gram)?;
    cx.backend().eigenvalues(gram.view())
}

/// Mean of `(after − before)/before` over matrices: what the paper plots per layer. Negative where
/// merging lowers the stable rank. Pairs with a zero `before` are left out; 0 when none are left.
pub fn mean_change(before: &[f64], after: &[f64]) -> f64 {
    let pairs: Vec<_> = before.iter().zip(after).filter(|(b, _)| **b != 0.0).collect();
    let sum: f64 = pairs.iter().map(|(b, a)| (*a - *b) / *b).sum();
    if pairs.is_empty() { 0.0 } else { sum / pairs.len() as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::singular_values;
    use ndarray::array;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn stable_ranks_by_hand() {
        let cx = Context::cpu(0);
        let of = |a: Array2<f32>| stable_rank(a.view(), &cx).unwrap();
        approx::assert_abs_diff_eq!(of(Array2::eye(5)), 5.0, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(of(array![[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 1.25);
        approx::assert_abs_diff_eq!(of(Array2::ones((7, 3))), 1.0, epsilon = 1e-12);
        assert_eq!(of(Array2::zeros((3, 2))), 0.0);
        assert!(stable_rank(array![[f32::NAN]].view(), &cx).is_err());
    }

    #[test]
    fn large_matrices_are_as_good() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut a = Array2::from_shape_simple_fn((600, 520), || rng.random_range(-1.0f32..1.0));
        for _ in 0..2 {
            let s = singular_values(a.view()).unwrap();
            let total: f64 = s.iter().map(|&s| f64::from(s).powi(2)).sum();
            let exact = total / f64::from(s[0]).powi(2);
            let found = stable_rank(a.view(), &Context::cpu(1)).unwrap();
            approx::assert_relative_eq!(found, exact, max_relative = 1e-3);
            // Flat the first time, then dominated by one direction.
            a += 0.3;
        }
    }

    #[test]
    fn changes_are_relative_means() {
        assert_eq!(mean_change(&[2.0, 4.0, 0.0], &[1.0, 5.0, 3.0]), -0.125);
        assert_eq!(mean_change(&[], &[]), 0.0);
    }
}
