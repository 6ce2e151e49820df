//! Second moments between two sets of features.

use std::ops::Range;

use faer::reborrow::ReborrowMut;
use faer::{Accum, MatMut, MatRef};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Zip};

use super::device::cpu::tiled;
use crate::error::{Error, Result};

/// Rows that are widened to `f64` at a time.
const ROWS: usize = 256;

/// Bands of rows in which a lower triangle is computed.
const BANDS: usize = 8;

/// `out ← out + Aᵀ B` for `A: (t, p)`, `B: (t, q)`, `out: (p, q)`, accumulated in `f64`.
///
/// A block of a Gram matrix. `2 t p q` operations on one thread: a caller with many blocks runs
/// them in parallel.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the shapes do not fit.
pub(crate) fn add_cross(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f64>,
) -> Result<()> {
    if a.nrows() != b.nrows() || out.dim() != (a.ncols(), b.ncols()) {
        return Err(misfit(a, b, &out));
    }
    add_products(a, b, (a.nrows(), |i| (i, i)), out)
}

/// [`add_cross`] of pairs of a row of `A` and a row of `B`: `out ← out + Σ a_i b_jᵀ`.
///
/// # Errors
/// As [`add_cross`]; also for a pair of rows that `A` and `B` do not have.
pub(crate) fn add_pairs(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    pairs: &[(usize, usize)],
    out: ArrayViewMut2<'_, f64>,
) -> Result<()> {
    let there = pairs.iter().all(|&(i, j)| i < a.nrows() && j < b.nrows());
    if !there || out.dim() != (a.ncols(), b.ncols()) {
        return Err(misfit(a, b, &out));
    }
    add_products(a, b, (pairs.len(), |i| pairs[i]), out)
}

/// [`add_cross`] of `A: (t, p)` with itself, of which nothing but the lower triangle is read: seven
/// sixteenths, above the diagonal, are left as they are.
///
/// # Errors
/// As [`add_cross`].
pub(crate) fn add_own(a: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f64>) -> Result<()> {
    let p = a.ncols();
    if out.dim() != (p, p) {
        return Err(misfit(a, a, &out));
    }
    let band = p.div_ceil(BANDS).max(1);
    let mut wide = Wide::of(a);
    add_to(out, |mut sum| {
        for rows in blocks(a.nrows()) {
            let wide = wide.rows(rows);
            for first in (0..p).step_by(band) {
                let (rows, end) = (band.min(p - first), (first + band).min(p));
                let left = wide.subcols(first, rows).transpose();
                let sum = sum.rb_mut().submatrix_mut(first, 0, rows, end);
                tiled(sum, Accum::Add, left, wide.subcols(0, end), 1.0, false);
            }
        }
    })
}

/// `out ← out + Σ a_i b_jᵀ` for so many pairs `(i, j)`.
fn add_products(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    (count, pair): (usize, impl Fn(usize) -> (usize, usize)),
    out: ArrayViewMut2<'_, f64>,
) -> Result<()> {
    let (mut left, mut right) = (Wide::of(a), Wide::of(b));
    add_to(out, |mut sum| {
        for pairs in blocks(count) {
            let left = left.rows(pairs.clone().map(|at| pair(at).0));
            let right = right.rows(pairs.map(|at| pair(at).1));
            tiled(sum.rb_mut(), Accum::Add, left.transpose(), right, 1.0, false);
        }
    })
}

fn misfit(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, out: &ArrayViewMut2<'_, f64>) -> Error {
    Error::shape("cross moments", "(t, p) (t, q) (p, q)", (a.dim(), b.dim(), out.dim()))
}

/// Adds what `add` adds to zeros: products are quickest where rows lie one behind the other.
fn add_to(mut out: ArrayViewMut2<'_, f64>, add: impl FnOnce(MatMut<'_, f64>)) -> Result<()> {
    let (p, q) = out.dim();
    let mut sum = Array2::zeros((p, q));
    let place = sum.as_slice_mut().ok_or_else(|| Error::shape("sums", "in row order", (p, q)))?;
    add(MatMut::from_row_major_slice_mut(place, p, q));
    out += &sum;
    Ok(())
}

/// Ranges of at most [`ROWS`] rows.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(ROWS).map(move |first| first..(first + ROWS).min(rows))
}

/// Rows of a matrix in `f64`, always in the same place: new memory for each block would cost more
/// than the products of a few columns.
struct Wide<'a> {
    from: ArrayView2<'a, f32>,
    place: Vec<f64>,
}

impl<'a> Wide<'a> {
    fn of(from: ArrayView2<'a, f32>) -> Self {
        Self { from, place: vec![0.0; ROWS * from.ncols()] }
    }

    /// At most [`ROWS`].
    fn rows(&mut self, rows: impl ExactSizeIterator<Item = usize>) -> MatRef<'_, f64> {
        let from = self.from;
        widened(rows.map(|row| from.row(row)), from.ncols(), &mut self.place)
    }
}

/// Rows of so many columns in `f64`, one behind the other.
pub(super) fn widened<'a, 'b>(
    rows: impl ExactSizeIterator<Item = ArrayView1<'b, f32>>,
    columns: usize,
    place: &'a mut [f64],
) -> MatRef<'a, f64> {
    let count = rows.len();
    for (wide, row) in place.chunks_exact_mut(columns.max(1)).zip(rows) {
        Zip::from(ArrayViewMut1::from(wide)).and(row).for_each(|wide, &x| *wide = f64::from(x));
    }
    MatRef::from_row_major_slice(&place[..count * columns], count, columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Axis;

    #[test]
    fn moments_are_those_of_the_definition_in_f64() {
        let value = |(i, j): (usize, usize)| ((i * 7919 + j * 104_729) % 1013) as f32 / 506.5 - 1.0;
        let a = Array2::from_shape_fn((1100, 5), value);
        let b = Array2::from_shape_fn((1100, 7), |(i, j)| value((j + 3, i)));
        let mut out = Array2::from_elem((5, 7), 1.0);
        add_cross(a.view(), b.view(), out.view_mut()).unwrap();
        let expected = a.mapv(f64::from).t().dot(&b.mapv(f64::from)) + 1.0;
        approx::assert_abs_diff_eq!(out, expected, epsilon = 1e-10);
        assert!(add_cross(a.view(), b.view(), Array2::zeros((7, 5)).view_mut()).is_err());
    }

    #[test]
    fn pairs_of_rows_are_those_that_are_named() {
        let value = |(i, j): (usize, usize)| ((i * 31 + j * 17) % 101) as f32;
        let (a, b) = (Array2::from_shape_fn((9, 3), value), Array2::from_shape_fn((7, 2), value));
        // More pairs than are widened at a time, and a row more than once.
        let pairs: Vec<_> = (0..ROWS + 5).map(|i| (i * 5 % 9, i * 3 % 7)).collect();
        let mut out = Array2::zeros((3, 2));
        add_pairs(a.view(), b.view(), &pairs, out.view_mut()).unwrap();
        let (left, right): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let mut expected = Array2::zeros((3, 2));
        let (a, b) = (a.select(Axis(0), &left), b.select(Axis(0), &right));
        add_cross(a.view(), b.view(), expected.view_mut()).unwrap();
        assert_eq!(out, expected);
        let beyond = add_pairs(a.view(), b.view(), &[(0, b.nrows())], out.view_mut());
        assert!(beyond.unwrap_err().to_string().contains("cross moments"));
    }

    #[test]
    fn own_moments_have_the_lower_triangle_of_all() {
        for p in [0, 1, 3, 4, 13] {
            let a = Array2::from_shape_fn((700, p), |(i, j)| ((i * 31 + j * 17) % 101) as f32);
            let (mut own, mut all) = (Array2::zeros((p, p)), Array2::zeros((p, p)));
            add_own(a.view(), own.view_mut()).unwrap();
            add_cross(a.view(), a.view(), all.view_mut()).unwrap();
            assert!(own.indexed_iter().all(|((i, j), &x)| j > i || x == all[[i, j]]), "{p}");
            assert!(add_own(a.view(), Array2::zeros((p, p + 1)).view_mut()).is_err());
        }
    }
}
