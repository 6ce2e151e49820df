//! The CPU: matrix products by `faer` on fixed output tiles, spread over rayon.
//!
//! Tiles have a fixed size, so every element is computed by the same instructions whatever the
//! number of threads; `faer`'s own parallelism is not used for that reason.

use std::sync::Arc;

use faer::linalg::matmul::matmul;
use faer::traits::ComplexField;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2};
use rayon::prelude::*;

use super::compute::{Compute, Term};
use crate::error::{Error, Result};
use crate::linalg::registers::with_clean_registers;

/// The processor that runs this program. Parallel over the rayon pool of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    parallel: bool,
}

impl Cpu {
    /// All threads of the current rayon pool.
    pub const fn new() -> Self {
        Self { parallel: true }
    }

    /// One thread, for use inside a task that runs in parallel with others.
    pub const fn sequential() -> Self {
        Self { parallel: false }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Side of an output tile: a product smaller than this runs on one thread.
const TILE: usize = 512;

/// Rows of `X` that are widened to `f64` at a time in a Gram product.
const GRAM_ROWS: usize = 512;

impl Compute for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn gemm(
        &self,
        alpha: f32,
        a: ArrayView2<'_, f32>,
        b: ArrayView2<'_, f32>,
        beta: f32,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<()> {
        if a.ncols() != b.nrows() || out.dim() != (a.nrows(), b.ncols()) {
            let found = (a.dim(), b.dim(), out.dim());
            return Err(Error::shape("gemm", "(m, k) (k, n) (m, n)", found));
        }
        let accum = match beta {
            0.0 => Accum::Replace,
            1.0 => Accum::Add,
            _ => {
                out *= beta;
                Accum::Add
            }
        };
        product(out, accum, a, b, alpha, self.parallel)
    }

    fn add_gram(&self, x: ArrayView2<'_, f32>, gram: &mut Array2<f64>) -> Result<()> {
        if gram.dim() != (x.ncols(), x.ncols()) {
            return Err(Error::shape("gram", (x.ncols(), x.ncols()), gram.dim()));
        }
        for rows in x.axis_chunks_iter(Axis(0), GRAM_ROWS) {
            let wide = rows.mapv(f64::from);
            product(gram.view_mut(), Accum::Add, wide.t(), wide.view(), 1.0, self.parallel)?;
        }
        Ok(())
    }

    fn weighted_sum(&self, terms: &[Term<'_>]) -> Result<Array2<f32>> {
        let (rows, cols) = check_terms(terms)?;
        let mut out = vec![0.0; rows * cols];
        if cols > 0 {
            let each = |(a, row): (usize, &mut [f32])| sum_row(terms, a, row);
            if self.parallel {
                out.par_chunks_mut(cols).enumerate().with_min_len(16).for_each(each);
            } else {
                out.chunks_mut(cols).enumerate().for_each(each);
            }
        }
        Array2::from_shape_vec((rows, cols), out)
            .map_err(|_| Error::shape("weighted sum", (rows, cols), "another size"))
    }

    fn per_task(&self) -> Arc<dyn Compute> {
        Arc::new(Self::sequential())
    }
}

/// `out ← [out +] alpha · a b`; the shapes were checked by the caller.
pub(in crate::linalg) fn product<T: ComplexField + Copy + Send + Sync>(
    mut out: ArrayViewMut2<'_, T>,
    accum: Accum,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    alpha: T,
    parallel: bool,
) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let (left, right) = (dense(a), dense(b));
    let (left, right) = (faer_ref(&left)?, faer_ref(&right)?);
    // An output that is not dense in either order is computed in a dense copy: rare.
    if !out.is_standard_layout() && !out.t().is_standard_layout() {
        let mut dense_out = out.to_owned();
        product(dense_out.view_mut(), accum, a, b, alpha, parallel)?;
        out.assign(&dense_out);
        return Ok(());
    }
    let transposed = !out.is_standard_layout();
    let (rows, cols) = out.dim();
    let slice = out.as_slice_memory_order_mut().ok_or_else(not_contiguous)?;
    let whole = if transposed {
        MatMut::from_column_major_slice_mut(slice, rows, cols)
    } else {
        MatMut::from_row_major_slice_mut(slice, rows, cols)
    };
    tiled(whole, accum, left, right, alpha, parallel);
    Ok(())
}

/// [`product`] of what `faer` sees, which may have gaps.
pub(in crate::linalg) fn tiled<T: ComplexField + Copy + Send + Sync>(
    whole: MatMut<'_, T>,
    accum: Accum,
    left: MatRef<'_, T>,
    right: MatRef<'_, T>,
    alpha: T,
    parallel: bool,
) {
    let (rows, cols) = (whole.nrows(), whole.ncols());
    let tiles = cut(whole, tile_of(rows), tile_of(cols));
    let each = |(i, j, tile): Tile<'_, T>| {
        let left = left.subrows(i, tile.nrows());
        let right = right.subcols(j, tile.ncols());
        with_clean_registers(|| matmul(tile, accum, left, right, alpha, Par::Seq));
    };
    // One thread takes the same tiles: it is faster on them than on the whole (by a seventh at
    // 1024 x 1024 x 3584, where a tile's panels stay in the second-level cache), and the bits are
    // those of the parallel product.
    if parallel { tiles.into_par_iter().for_each(each) } else { tiles.into_iter().for_each(each) }
}

/// First row, first column, and the part of a matrix that begins there.
pub(in crate::linalg) type Tile<'a, T> = (usize, usize, MatMut<'a, T>);

/// Cuts a matrix into tiles of at most so many rows and columns, row by row of tiles.
pub(in crate::linalg) fn cut<T>(
    whole: MatMut<'_, T>,
    tall: usize,
    wide: usize,
) -> Vec<Tile<'_, T>> {
    let (mut rest, mut i, mut tiles) = (whole, 0, Vec::new());
    while rest.nrows() > 0 {
        let at = tall.min(rest.nrows());
        let (mut strip, below) = rest.split_at_row_mut(at);
        let mut j = 0;
        while strip.ncols() > 0 {
            let at = wide.min(strip.ncols());
            let (tile, right) = strip.split_at_col_mut(at);
            tiles.push((i, j, tile));
            (strip, j) = (right, j + at);
        }
        (rest, i) = (below, i + at);
    }
    tiles
}

/// Cuts `n` into equal parts of at most [`TILE`], rounded up to full vector registers.
fn tile_of(n: usize) -> usize {
    n.div_ceil(n.div_ceil(TILE).max(1)).next_multiple_of(16)
}

/// The matrix itself when it is dense in row or column order, else a dense copy; also of a part
/// without elements, whose strides are those of the whole.
fn dense<'a, T: Copy>(a: ArrayView2<'a, T>) -> CowArray<'a, T, Ix2> {
    if !a.is_empty() && (a.is_standard_layout() || a.t().is_standard_layout()) {
        CowArray::from(a)
    } else {
        CowArray::from(a.as_standard_layout().into_owned())
    }
}

fn faer_ref<'a, T>(a: &'a CowArray<'_, T, Ix2>) -> Result<MatRef<'a, T>> {
    let (rows, cols) = a.dim();
    let slice = a.as_slice_memory_order().ok_or_else(not_contiguous)?;
    Ok(if a.is_standard_layout() {
        MatRef::from_row_major_slice(slice, rows, cols)
    } else {
        MatRef::from_column_major_slice(slice, rows, cols)
    })
}

fn not_contiguous() -> Error {
    Error::bug("a matrix made dense for a product has gaps in memory")
}

pub(crate) fn check_terms(terms: &[Term<'_>]) -> Result<(usize, usize)> {
    let first = terms.first().ok_or_else(|| Error::range("weighted sum", "a term", "none"))?;
    let shape = first.matrix.dim();
    for term in terms {
        if term.matrix.dim() != shape {
            return Err(Error::shape("weighted sum", shape, term.matrix.dim()));
        }
        for (gather, n, axis) in [(term.rows, shape.0, "rows"), (term.cols, shape.1, "cols")] {
            let Some(gather) = gather else { continue };
            if gather.len() != n || gather.iter().any(|&i| i as usize >= n) {
                let expected = format!("{n} {axis} below {n}");
                return Err(Error::range("weighted sum gather", expected, gather.len()));
            }
        }
    }
    Ok(shape)
}

fn sum_row(terms: &[Term<'_>], a: usize, out: &mut [f32]) {
    for (i, term) in terms.iter().enumerate() {
        let source = term.matrix.row(term.rows.map_or(a, |rows| rows[a] as usize));
        // The first term is stored, not added to 0, so that one term of weight 1 keeps every bit,
        // the sign of zero included.
        match (term.cols, source.as_slice()) {
            (None, Some(source)) => put(out, source.iter().copied(), term.weight, i == 0),
            (None, None) => put(out, source.iter().copied(), term.weight, i == 0),
            (Some(cols), _) => {
                put(out, cols.iter().map(|&c| source[c as usize]), term.weight, i == 0);
            }
        }
    }
}

fn put(out: &mut [f32], source: impl Iterator<Item = f32>, weight: f32, first: bool) {
    if first {
        out.iter_mut().zip(source).for_each(|(o, x)| *o = weight * x);
    } else {
        out.iter_mut().zip(source).for_each(|(o, x)| *o += weight * x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn matrix(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        let value = |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1013) as f32 / 506.5 - 1.0;
        Array2::from_shape_fn((rows, cols), value)
    }

    #[test]
    fn parts_without_rows_or_depth_are_multiplied() {
        let (a, b) = (matrix(7, 5, 1), matrix(5, 6, 2));
        let cpu = Cpu::new();
        let mut none = Array2::zeros((0, 6));
        cpu.gemm(1.0, a.slice(ndarray::s![3..3, ..]), b.view(), 0.0, none.view_mut()).unwrap();
        let (left, right) = (a.slice(ndarray::s![.., 2..2]), b.slice(ndarray::s![2..2, ..]));
        let mut sums = Array2::ones((7, 6));
        cpu.gemm(1.0, left, right, 1.0, sums.view_mut()).unwrap();
        assert_eq!(sums, Array2::<f32>::ones((7, 6)));
        cpu.gemm(1.0, left, right, 0.0, sums.view_mut()).unwrap();
        assert_eq!(sums, Array2::<f32>::zeros((7, 6)));
    }

    fn naive(a: &ArrayView2<'_, f32>, b: &ArrayView2<'_, f32>) -> Array2<f64> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            a.row(i).iter().zip(b.column(j)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
        })
    }

    /// Forward error of a dot product of length k of values up to 1.
    fn tolerance(k: usize) -> f64 {
        2.0 * f64::from(f32::EPSILON) * k as f64
    }

    #[test]
    fn gemm_matches_the_definition_for_every_layout() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 33, 65), (600, 40, 530), (0, 3, 2), (2, 0, 3)]
        {
            let (a, b, at, bt) =
                (matrix(m, k, 1), matrix(k, n, 2), matrix(k, m, 3), matrix(n, k, 4));
            let wide = matrix(m, 2 * k, 5);
            let strided = wide.slice(ndarray::s![.., ..;2]);
            for left in [a.view(), at.t(), strided] {
                for right in [b.view(), bt.t()] {
                    let expected = naive(&left, &right);
                    for cpu in [Cpu::new(), Cpu::sequential()] {
                        let mut out = Array2::from_elem((m, n), f32::NAN);
                        cpu.gemm(1.0, left, right, 0.0, out.view_mut()).unwrap();
                        let error = (&out.mapv(f64::from) - &expected).mapv(f64::abs);
                        assert!(error.iter().all(|&e| e <= tolerance(k)), "{m}x{k}x{n}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn gemm_scales_and_accumulates_into_any_output() {
        let (a, b) = (array![[1.0, 2.0], [3.0, 4.0]], array![[1.0, 1.0], [1.0, 0.0]]);
        let mut out = Array2::from_elem((4, 4), 10.0);
        let strided = out.slice_mut(ndarray::s![..;2, ..;2]);
        Cpu::new().gemm(2.0, a.view(), b.view(), 0.5, strided).unwrap();
        assert_eq!(out.slice(ndarray::s![..;2, ..;2]), array![[11.0, 7.0], [19.0, 11.0]]);
        let mut column_major = Array2::zeros((2, 2)).reversed_axes();
        Cpu::new().gemm(1.0, a.view(), b.view(), 1.0, column_major.view_mut()).unwrap();
        assert_eq!(column_major, array![[3.0, 1.0], [7.0, 3.0]]);
    }

    #[test]
    fn gemm_has_the_same_bits_at_any_width() {
        let (a, b) = (matrix(700, 129, 1), matrix(129, 1100, 2));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = Array2::zeros((700, 1100));
            pool.install(|| Cpu::new().gemm(1.0, a.view(), b.view(), 0.0, out.view_mut())).unwrap();
            out.mapv(f32::to_bits)
        };
        let one = run(1);
        assert!([2, 8].iter().all(|&threads| run(threads) == one));
    }

    #[test]
    fn gram_accumulates_in_f64() {
        let x = matrix(1500, 9, 3);
        let mut gram = Array2::zeros((9, 9));
        Cpu::new().add_gram(x.view(), &mut gram).unwrap();
        let expected = naive(&x.t(), &x.view());
        let error = (&gram - &expected).mapv(f64::abs);
        assert!(error.iter().all(|&e| e <= 1500.0 * 2.0 * f64::EPSILON * 1500.0), "{error}");
    }

    #[test]
    fn weighted_sum_gathers_rows_and_columns() {
        let a = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let terms = [
            Term::plain(1.0, a.view()),
            Term { weight: 10.0, matrix: a.view(), rows: Some(&[1, 0]), cols: Some(&[2, 0, 1]) },
        ];
        let sum = Cpu::new().weighted_sum(&terms).unwrap();
        assert_eq!(sum, array![[61.0, 42.0, 53.0], [34.0, 15.0, 26.0]]);
    }

    #[test]
    fn misfits_are_errors() {
        let a = matrix(2, 3, 0);
        let mut out = Array2::zeros((2, 2));
        let misfit = Cpu::new().gemm(1.0, a.view(), a.view(), 0.0, out.view_mut());
        assert!(misfit.unwrap_err().to_string().starts_with("gemm: expected shape"));
        assert!(Cpu::new().add_gram(a.view(), &mut Array2::zeros((2, 2))).is_err());
        assert!(Cpu::new().weighted_sum(&[]).is_err());
        let beyond = Term { weight: 1.0, matrix: a.view(), rows: Some(&[0, 2]), cols: None };
        assert!(Cpu::new().weighted_sum(&[beyond]).is_err());
    }
}
