//! Second moments between two sets of features.

use faer::Accum;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

use super::cpu::product;
use crate::error::{Error, Result};

/// Rows that are widened to `f64` at a time.
const ROWS: usize = 512;

/// `out ← out + Aᵀ B` for `A: (t, p)`, `B: (t, q)`, `out: (p, q)`, accumulated in `f64`.
///
/// A block of a Gram matrix. `2 t p q` operations on one thread: a caller with many blocks runs
/// them in parallel.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the shapes do not fit.
pub fn add_cross(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    mut out: ArrayViewMut2<'_, f64>,
) -> Result<()> {
    if a.nrows() != b.nrows() || out.dim() != (a.ncols(), b.ncols()) {
        let found = (a.dim(), b.dim(), out.dim());
        return Err(Error::shape("cross moments", "(t, p) (t, q) (p, q)", found));
    }
    for (a, b) in a.axis_chunks_iter(Axis(0), ROWS).zip(b.axis_chunks_iter(Axis(0), ROWS)) {
        let (a, b) = (a.mapv(f64::from), b.mapv(f64::from));
        product(out.view_mut(), Accum::Add, a.t(), b.view(), 1.0, false);
    }
    Ok(())
}

/// [`add_cross`] of `A: (t, p)` with itself, of which nothing but the lower triangle is read: three
/// eighths, above the diagonal, are left as they are.
///
/// # Errors
/// As [`add_cross`].
pub fn add_own(a: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f64>) -> Result<()> {
    let p = a.ncols();
    if out.dim() != (p, p) {
        return Err(Error::shape("own moments", "(t, p) (p, p)", (a.dim(), out.dim())));
    }
    let band = p.div_ceil(4).max(1);
    for first in (0..p).step_by(band) {
        let end = (first + band).min(p);
        let (rows, columns) = (a.slice(s![.., first..end]), a.slice(s![.., ..end]));
        add_cross(rows, columns, out.slice_mut(s![first..end, ..end]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

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
