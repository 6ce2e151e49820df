//! Root-mean-square layer norm, the only norm of these families.

use ndarray::{Array1, Array2, ArrayView2};

use crate::error::{Error, Result};
use crate::forward::math::sum_squares;
use crate::par;

/// `y = w ⊙ x / sqrt(mean(x²) + eps)`.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNorm {
    weight: Array1<f32>,
    eps: f32,
}

/// Rows that one task normalises.
const ROWS: usize = 64;

impl RmsNorm {
    /// `weight: (d)`.
    pub fn new(weight: Array1<f32>, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// Width of a row.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// Normalises every row of `X: (t, d)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn forward(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        let mut out = x.as_standard_layout().into_owned();
        if x.ncols() != self.width() {
            return Err(Error::shape("norm", self.width(), x.ncols()));
        }
        self.in_place(&mut out)?;
        Ok(out)
    }

    /// Normalises consecutive pieces of `width` values: whole rows, or each head of each row.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when a row does not divide into pieces.
    pub(crate) fn in_place(&self, x: &mut Array2<f32>) -> Result<()> {
        let width = self.width();
        if width == 0 || !x.ncols().is_multiple_of(width) {
            return Err(Error::shape("norm", format!("a multiple of {width}"), x.ncols()));
        }
        let found = x.dim();
        let Some(values) = x.as_slice_mut() else {
            return Err(Error::shape("norm", "rows in memory order", found));
        };
        par::for_each_chunk(values, ROWS * width, |_, rows| {
            rows.chunks_exact_mut(width).for_each(|row| self.row(row));
        });
        Ok(())
    }

    fn row(&self, row: &mut [f32]) {
        let mean = sum_squares(row) / row.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        row.iter_mut().zip(&self.weight).for_each(|(x, w)| *x = w * (*x * scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn rows_and_heads_are_normalised() {
        let norm = RmsNorm::new(array![1.0, 2.0], 0.0);
        let y = norm.forward(array![[3.0, 4.0]].view()).unwrap();
        let rms = 12.5f32.sqrt();
        approx::assert_abs_diff_eq!(y, array![[3.0 / rms, 8.0 / rms]], epsilon = 1e-6);
        let mut heads = array![[1.0, 1.0, 2.0, 2.0]];
        norm.in_place(&mut heads).unwrap();
        approx::assert_abs_diff_eq!(heads, array![[1.0, 2.0, 1.0, 2.0]], epsilon = 1e-6);
        assert!(norm.forward(array![[1.0]].view()).is_err());
    }
}
