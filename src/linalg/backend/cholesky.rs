//! Factors, and solves with, a symmetric positive definite matrix, by Cholesky in `f64`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::reborrow::{IntoConst, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, Axis, s};

use super::bridge::to_faer;
use crate::error::{Error, ErrorKind, Result};
use crate::linalg::device::cpu::cut;
use crate::linalg::registers::with_clean_registers;
use crate::par;

/// Rows and columns that are factorised at a time. These sizes are fixed, so that the bits do not
/// depend on the number of threads.
const BLOCK: usize = 128;

/// Right-hand sides that one task solves for, also those of a block below the diagonal.
const COLUMNS: usize = 64;

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
    let mut lower = gram.to_owned();
    factorise(&mut lower)?;
    for (j, mut column) in lower.columns_mut().into_iter().enumerate() {
        column.slice_mut(s![..j]).fill(0.0);
    }
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
    solve_spd_in(&mut gram.to_owned(), rhs)
}

/// [`solve_spd`] with the factor in the place of `G`: no second matrix of its size.
pub(super) fn solve_spd_in(
    gram: &mut Array2<f64>,
    rhs: ArrayView2<'_, f64>,
) -> Result<Array2<f64>> {
    let (n, m) = rhs.dim();
    if gram.dim() != (n, n) {
        return Err(Error::shape("Cholesky solve", (n, n), gram.dim()));
    }
    factorise(gram)?;
    let lower = MatRef::from_column_major_slice(dense(gram.as_slice_memory_order())?, n, n);
    let solved = par::map(m.div_ceil(COLUMNS), |b| {
        let columns = s![.., b * COLUMNS..((b + 1) * COLUMNS).min(m)];
        let mut x = to_faer(rhs.slice(columns));
        with_clean_registers(|| {
            solve_lower_triangular_in_place(lower, x.as_mut(), Par::Seq);
            solve_upper_triangular_in_place(lower.transpose(), x.as_mut(), Par::Seq);
        });
        Ok(x)
    })?;
    let x = Array2::from_shape_fn((n, m), |(i, j)| solved[j / COLUMNS][(i, j % COLUMNS)]);
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => Err(failure("the solution is not finite".into())),
    }
}

/// Puts `L` into the place of `G` and in column order, whatever the order of that was; what is
/// above the diagonal is of no use.
///
/// Right-looking: a block of columns is factorised, and what is to its right made less its product,
/// tile by tile in parallel.
fn factorise(gram: &mut Array2<f64>) -> Result<()> {
    let n = gram.nrows();
    if !gram.t().is_standard_layout() {
        if !gram.is_standard_layout() {
            *gram = gram.as_standard_layout().into_owned();
        }
        mirror(gram);
        gram.swap_axes(0, 1);
    }
    let place = dense(gram.as_slice_memory_order_mut())?;
    let mut all = MatMut::from_column_major_slice_mut(place, n, n);
    for first in (0..n).step_by(BLOCK) {
        let rest = all.rb_mut().submatrix_mut(first, first, n - first, n - first);
        let size = BLOCK.min(rest.nrows());
        let (mut corner, _, mut panel, right) = rest.split_at_mut(size, size);
        factorise_block(corner.rb_mut())?;
        let corner = corner.into_const();
        par::map_mut(&mut cut(panel.rb_mut(), COLUMNS, size), |_, (_, _, rows)| {
            // L₁ with L₁ L₀ᵀ = G₁, so L₀ L₁ᵀ = G₁ᵀ.
            let rows = rows.rb_mut().transpose_mut();
            with_clean_registers(|| solve_lower_triangular_in_place(corner, rows, Par::Seq));
            Ok(())
        })?;
        subtract_own(right, panel.into_const())?;
    }
    Ok(())
}

/// Copies the lower triangle over the upper one.
fn mirror(gram: &mut Array2<f64>) {
    /// Rows at a time: what is written lies in whole cache lines.
    const ROWS: usize = 16;
    let n = gram.nrows();
    for first in (0..n).step_by(ROWS) {
        let end = (first + ROWS).min(n);
        let (mut above, mut own) = gram.view_mut().split_at(Axis(0), first);
        let lower = own.slice(s![..end - first, ..first]);
        above.slice_mut(s![.., first..end]).assign(&lower.t());
        for i in 0..end - first {
            for j in 0..i {
                own[[j, first + i]] = own[[i, first + j]];
            }
        }
    }
}

/// `G ← G − P Pᵀ` in the lower triangle.
fn subtract_own(gram: MatMut<'_, f64>, panel: MatRef<'_, f64>) -> Result<()> {
    let mut tiles = cut(gram, BLOCK, BLOCK);
    tiles.retain(|(row, column, _)| row >= column);
    par::map_mut(&mut tiles, |_, (row, column, tile)| {
        let left = panel.subrows(*row, tile.nrows());
        let right = panel.subrows(*column, tile.ncols()).transpose();
        let tile = tile.rb_mut();
        with_clean_registers(|| match row == column {
            true => triangular::matmul(
                tile,
                BlockStructure::TriangularLower,
                Accum::Add,
                left,
                BlockStructure::Rectangular,
                right,
                BlockStructure::Rectangular,
                -1.0,
                Par::Seq,
            ),
            false => matmul(tile, Accum::Add, left, right, -1.0, Par::Seq),
        });
        Ok(())
    })?;
    Ok(())
}

/// The factor of a block, in its lower triangle.
fn factorise_block(block: MatMut<'_, f64>) -> Result<()> {
    let scratch =
        factor::cholesky_in_place_scratch::<f64>(block.nrows(), Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    with_clean_registers(|| {
        factor::cholesky_in_place(block, Default::default(), Par::Seq, stack, Default::default())
    })
    .map(|_| ())
    .map_err(|e| failure(format!("the matrix is not positive definite ({e:?})")))
}

/// What a matrix that leaves no gaps lies in.
fn dense<T>(slice: Option<T>) -> Result<T> {
    slice.ok_or_else(|| failure("the matrix has gaps".into()))
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
    fn the_order_of_the_matrix_does_not_matter() {
        let n = BLOCK + 37;
        let (mut gram, rhs) = system(n, COLUMNS + 3);
        for i in 0..n {
            gram.slice_mut(s![i, i + 1..]).fill(f64::NAN);
        }
        let mut gaps = Array2::zeros((n, 2 * n));
        gaps.slice_mut(s![.., ..;2]).assign(&gram);
        let by_columns = gram.t().as_standard_layout().into_owned().reversed_axes();
        assert!(!by_columns.is_standard_layout());
        let (x, lower) = (solve_spd(gram.view(), rhs.view()).unwrap(), cholesky(gram.view()));
        for other in [by_columns.view(), gaps.slice(s![.., ..;2])] {
            assert_eq!(solve_spd(other, rhs.view()).unwrap(), x);
            assert_eq!(&cholesky(other).unwrap(), lower.as_ref().unwrap());
        }
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
