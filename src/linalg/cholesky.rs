//! Factors, and solves with, a symmetric positive definite matrix, by Cholesky in `f64`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor;
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::reborrow::ReborrowMut;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, Axis, s};

use super::bridge::to_faer;
use crate::error::{Error, ErrorKind, Result};
use crate::par;

/// Rows and columns that are factorised at a time, and columns that are solved for at a time:
/// fixed, so that the bits do not depend on the number of threads.
const BLOCK: usize = 256;

/// The lower Cholesky factor `L` of a symmetric positive definite `G = L Lᵀ: (n, n)`, of which only
/// the lower triangle is read; zeros above the diagonal. `n³/3` operations, in parallel, with the
/// same bits at any number of threads.
///
/// # Errors
/// [`ErrorKind::Shape`] unless `G` is square; [`ErrorKind::Numerical`] when it is not positive
/// definite.
pub fn cholesky(gram: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let n = gram.nrows();
    if gram.dim() != (n, n) {
        return Err(Error::shape("Cholesky factorisation", (n, n), gram.dim()));
    }
    let mut lower = gram.as_standard_layout().into_owned();
    factorise(&mut lower)?;
    lower.indexed_iter_mut().filter(|((i, j), _)| j > i).for_each(|(_, x)| *x = 0.0);
    Ok(lower)
}

/// Solves `G X = B` for a symmetric positive definite `G: (n, n)` and `B: (n, m)`: `X: (n, m)`.
///
/// `G = L Lᵀ`, then two triangular solves; only the lower triangle of `G` is read. `n³/3 + 2 n² m`
/// operations, in parallel, with the same bits at any number of threads.
///
/// # Errors
/// [`ErrorKind::Shape`] when the shapes do not fit; [`ErrorKind::Numerical`] when `G` is not
/// positive definite or the solution is not finite.
pub fn solve_spd(gram: ArrayView2<'_, f64>, rhs: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    solve_spd_in(gram.as_standard_layout().into_owned(), rhs)
}

/// [`solve_spd`] with the factor in the place of `G`: no second matrix of its size.
pub(super) fn solve_spd_in(mut gram: Array2<f64>, rhs: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let (n, m) = rhs.dim();
    if gram.dim() != (n, n) {
        return Err(Error::shape("Cholesky solve", (n, n), gram.dim()));
    }
    if !gram.is_standard_layout() {
        gram = gram.as_standard_layout().into_owned();
    }
    factorise(&mut gram)?;
    let lower = rows_of(&gram)?;
    let solved = par::map(m.div_ceil(BLOCK), |b| {
        let columns = s![.., b * BLOCK..((b + 1) * BLOCK).min(m)];
        let mut x = to_faer(rhs.slice(columns));
        solve_lower_triangular_in_place(lower, x.as_mut(), Par::Seq);
        solve_upper_triangular_in_place(lower.transpose(), x.as_mut(), Par::Seq);
        Ok(x)
    })?;
    let x = Array2::from_shape_fn((n, m), |(i, j)| solved[j / BLOCK][(i, j % BLOCK)]);
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => Err(failure("the solution is not finite".into())),
    }
}

/// Puts `L` into the lower triangle of `G`, which is in row order; what is above it is left.
///
/// Right-looking: a block of columns is factorised, and what is to its right made less its product,
/// strips of rows in parallel.
fn factorise(gram: &mut Array2<f64>) -> Result<()> {
    let n = gram.nrows();
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        let mut corner = to_faer(gram.slice(s![first..end, first..end]));
        factorise_block(&mut corner)?;
        let own = Array2::from_shape_fn(corner.shape(), |(i, j)| corner[(i, j)]);
        gram.slice_mut(s![first..end, first..end]).assign(&own);
        if end == n {
            break;
        }
        let mut below = gram.slice_mut(s![end.., first..end]);
        let mut strips: Vec<_> = below.axis_chunks_iter_mut(Axis(0), BLOCK).collect();
        par::map_mut(&mut strips, |_, rows| {
            // L₁ with L₁ L₀ᵀ = G₁, so L₀ L₁ᵀ = G₁ᵀ.
            let mut transposed = to_faer(rows.t());
            solve_lower_triangular_in_place(corner.as_ref(), transposed.as_mut(), Par::Seq);
            rows.indexed_iter_mut().for_each(|((i, j), x)| *x = transposed[(j, i)]);
            Ok(())
        })?;
        let panel = below.as_standard_layout().into_owned();
        subtract_own(gram, end, rows_of(&panel)?)?;
    }
    Ok(())
}

/// `G ← G − P Pᵀ` in the lower triangle of what begins at row and column `first`.
fn subtract_own(gram: &mut Array2<f64>, first: usize, panel: MatRef<'_, f64>) -> Result<()> {
    let n = gram.ncols();
    let Some(all) = gram.as_slice_mut() else { return Err(failure("not in row order".into())) };
    par::for_each_chunk(&mut all[first * n..], BLOCK * n, |i, rows| {
        let (count, from) = (rows.len() / n, i * BLOCK);
        let mut strip = MatMut::from_row_major_slice_mut(rows, count, n);
        let left = panel.subrows(from, count);
        for at in (0..from + count).step_by(BLOCK) {
            let width = BLOCK.min(from + count - at);
            let tile = strip.rb_mut().subcols_mut(first + at, width);
            matmul(tile, Accum::Add, left, panel.subrows(at, width).transpose(), -1.0, Par::Seq);
        }
    });
    Ok(())
}

/// The factor of a block, in its lower triangle.
fn factorise_block(block: &mut Mat<f64>) -> Result<()> {
    let scratch =
        factor::cholesky_in_place_scratch::<f64>(block.nrows(), Par::Seq, Default::default());
    factor::cholesky_in_place(
        block.as_mut(),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map(|_| ())
    .map_err(|e| failure(format!("the matrix is not positive definite ({e:?})")))
}

/// A matrix in row order as `faer` sees it.
fn rows_of(a: &Array2<f64>) -> Result<MatRef<'_, f64>> {
    let slice = a.as_slice().ok_or_else(|| failure("not in row order".into()))?;
    Ok(MatRef::from_row_major_slice(slice, a.nrows(), a.ncols()))
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
        // Within a block, and over several of rows and of right-hand sides.
        for (n, m) in [(70, 3), (2 * BLOCK + 70, BLOCK + 3)] {
            let (gram, rhs) = system(n, m);
            let x = solve_spd(gram.view(), rhs.view()).unwrap();
            let scale = gram.iter().chain(&x).fold(0.0f64, |m, v| m.max(v.abs()));
            let error = (gram.dot(&x) - rhs).mapv(f64::abs);
            let tolerance = f64::EPSILON * (n * n) as f64 * scale;
            assert!(error.iter().all(|&e| e <= tolerance), "{n}");
        }
    }

    /// A positive definite matrix and right-hand sides.
    fn system(n: usize, m: usize) -> (Array2<f64>, Array2<f64>) {
        let value = |(i, j)| ((i * 7919 + j * 104_729) % 1013) as f64 / 506.5 - 1.0;
        let a = Array2::from_shape_fn((n + 5, n), value);
        (a.t().dot(&a) + Array2::<f64>::eye(n), Array2::from_shape_fn((n, m), value))
    }

    #[test]
    fn blocks_have_the_same_bits_at_any_width_and_their_product_is_the_matrix() {
        let n = BLOCK + 150;
        let (gram, rhs) = system(n, 2 * BLOCK);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| solve_spd(gram.view(), rhs.view()).unwrap().mapv(f64::to_bits))
        };
        let one = run(1);
        assert!([2, 5].iter().all(|&threads| run(threads) == one));
        let lower = cholesky(gram.t()).unwrap();
        let scale = gram.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let error = (lower.dot(&lower.t()) - gram).mapv(f64::abs);
        assert!(error.iter().all(|&e| e <= f64::EPSILON * n as f64 * scale));
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
