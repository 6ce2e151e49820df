//! Inner products between the rows of a block-sparse matrix: the system of a ridge fit that has
//! fewer rows than columns.

use faer::{Accum, MatMut};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::cross::widened;
use super::device::cpu::tiled;
use crate::error::{Error, Result};
use crate::par;

/// Rows of the result that one task computes.
const BAND: usize = 256;

/// Columns that are widened to `f64` at a time.
const COLUMNS: usize = 512;

/// Some rows of a block of columns, the only ones that are not 0 there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Which, ascending.
    pub(crate) at: &'a [usize],
    /// `(at.len(), columns)`.
    pub(crate) values: ArrayView2<'a, f32>,
}

/// `K = Φ Φᵀ: (t, t)` in `f64`, for a `Φ` of `t` rows and blocks of columns side by side.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What is above the diagonal is 0.
    lower: Array2<f64>,
}

impl Kernel {
    /// `Σ t_b² c_b` operations for blocks of `c_b` columns with `t_b` rows each, in parallel, with
    /// the same bits at any number of threads; `8 t²` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) for rows that `Φ` does not have.
    pub(crate) fn new(t: usize, blocks: &[Rows<'_>]) -> Result<Self> {
        for block in blocks {
            let (rows, end) = (block.at.len(), block.at.last().map_or(0, |last| last + 1));
            if rows != block.values.nrows() || end > t {
                let found = (block.values.nrows(), end);
                return Err(Error::shape("rows of a block and their end", (rows, t), found));
            }
        }
        let mut lower = Array2::zeros((t, t));
        let mut bands: Vec<_> = lower.axis_chunks_iter_mut(Axis(0), BAND).collect();
        par::map_mut(&mut bands, |i, band| {
            blocks.iter().for_each(|block| add(band.view_mut(), i * BAND, block));
            Ok(())
        })?;
        Ok(Self { lower })
    }

    /// The products of the rows `of` with the rows `with`.
    pub(crate) fn between(&self, of: &[usize], with: &[usize]) -> Array2<f64> {
        let lower = |a: usize, b: usize| self.lower[[a.max(b), a.min(b)]];
        Array2::from_shape_fn((of.len(), with.len()), |(i, j)| lower(of[i], with[j]))
    }

    /// The lower triangle of the products of some ascending rows with each other.
    pub(crate) fn own(&self, of: &[usize]) -> Array2<f64> {
        let mut own = Array2::zeros((of.len(), of.len()));
        for (i, (mut own, &row)) in own.rows_mut().into_iter().zip(of).enumerate() {
            let row = self.lower.row(row);
            own.iter_mut().zip(&of[..=i]).for_each(|(own, &column)| *own = row[column]);
        }
        own
    }
}

/// Adds the products of a block's rows in a band of the lower triangle that begins at `first`.
fn add(mut band: ArrayViewMut2<'_, f64>, first: usize, block: &Rows<'_>) {
    let from = block.at.partition_point(|&row| row < first);
    let to = block.at.partition_point(|&row| row < first + band.nrows());
    if from == to {
        return;
    }
    let (rows, width) = (to - from, COLUMNS.min(block.values.ncols()));
    // Both in the same place for all columns: new memory would cost a good part of the products.
    let (mut sum, mut place) = (vec![0.0; rows * to], vec![0.0; to * width]);
    for start in (0..block.values.ncols()).step_by(COLUMNS) {
        let end = (start + COLUMNS).min(block.values.ncols());
        let values = block.values.slice(s![..to, start..end]);
        let right = widened(values.rows().into_iter(), end - start, &mut place);
        let left = right.subrows(from, rows);
        let sum = MatMut::from_row_major_slice_mut(&mut sum, rows, to);
        tiled(sum, Accum::Add, left, right.transpose(), 1.0, false);
    }
    for (i, sum) in sum.chunks_exact(to).enumerate() {
        let mut row = band.row_mut(block.at[from + i] - first);
        let own = block.at[..=from + i].iter().zip(sum);
        own.for_each(|(&column, x)| row[column] += x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_the_products_of_the_whole_matrix_at_any_width() {
        let (t, f) = (BAND + 90, COLUMNS + 30);
        let value = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1013) as f32 / 506.5 - 1.0;
        // One block has every third row, one every row: two rows meet in both, in one, in none.
        let third: Vec<usize> = (0..t).step_by(3).collect();
        let most: Vec<usize> = (1..t).collect();
        let a = Array2::from_shape_fn((third.len(), f), |(i, j)| value(i, j));
        let b = Array2::from_shape_fn((most.len(), 5), |(i, j)| value(i + 17, j + 3));
        let mut phi = Array2::<f64>::zeros((t, f + 5));
        third.iter().zip(a.rows()).for_each(|(&t, row)| {
            phi.slice_mut(s![t, ..f]).assign(&row.mapv(f64::from));
        });
        most.iter().zip(b.rows()).for_each(|(&t, row)| {
            phi.slice_mut(s![t, f..]).assign(&row.mapv(f64::from));
        });
        let blocks = [Rows { at: &third, values: a.view() }, Rows { at: &most, values: b.view() }];
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| Kernel::new(t, &blocks)).unwrap()
        };
        let kernel = run(3);
        assert_eq!(kernel.lower, run(1).lower);
        let all: Vec<usize> = (0..t).collect();
        let expected = phi.dot(&phi.t());
        let tolerance = f64::EPSILON * ((f + 5) * (f + 5)) as f64;
        approx::assert_abs_diff_eq!(kernel.between(&all, &all), expected, epsilon = tolerance);
        let own = kernel.own(&[1, 7, t - 1]);
        assert_eq!((own[[0, 1]], own[[2, 1]]), (0.0, kernel.between(&[t - 1], &[7])[[0, 0]]));
        assert!(Kernel::new(t - 1, &blocks).is_err());
    }
}
