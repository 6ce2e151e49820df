//! Causal convolution of each channel along the tokens, with a few taps.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use crate::error::{Error, Result};
use crate::par;

/// `y[t, c] = Σ_j w[c, j] · x[t − K + 1 + j, c]`, with zeros before the first token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Convolution {
    /// `(K, channels)`: taps by row, the last one for the token itself.
    taps: Array2<f32>,
}

impl Convolution {
    /// `weight: (channels, K)`.
    pub(crate) fn new(weight: ArrayView2<'_, f32>) -> Self {
        Self { taps: weight.t().as_standard_layout().into_owned() }
    }

    /// Number of tokens before a token that it depends on.
    pub(crate) fn past(&self) -> usize {
        self.taps.nrows().saturating_sub(1)
    }

    /// Convolves each window of `X: (t, channels)` by itself.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) for another number of channels.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
    ) -> Result<Array2<f32>> {
        let channels = self.taps.ncols();
        if x.ncols() != channels {
            return Err(Error::shape("convolution", channels, x.ncols()));
        }
        let mut start = vec![0; x.nrows()];
        for window in windows {
            start[window.clone()].fill(window.start);
        }
        let rows = par::map(x.nrows(), |t| {
            let mut row = vec![0.0f32; channels];
            for back in 0..self.taps.nrows().min(t + 1 - start[t]) {
                let taps = self.taps.row(self.past() - back);
                let source = x.row(t - back);
                row.iter_mut().zip(taps).zip(source).for_each(|((y, w), x)| *y += w * x);
            }
            Ok(row)
        })?;
        Array2::from_shape_vec(x.dim(), rows.concat())
            .map_err(|_| Error::shape("convolution", x.dim(), channels))
    }

    /// Convolves the next tokens of one window, `tail: (≤ K − 1, channels)` the last ones before
    /// them; afterwards it holds the last ones of all.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub(crate) fn step(
        &self,
        x: ArrayView2<'_, f32>,
        tail: &mut Array2<f32>,
    ) -> Result<Array2<f32>> {
        let past = tail.nrows();
        let joined = ndarray::concatenate(ndarray::Axis(0), &[tail.view(), x])
            .map_err(|_| Error::shape("convolution", tail.ncols(), x.ncols()))?;
        let all = 0..joined.nrows();
        let out = self.forward(joined.view(), std::slice::from_ref(&all))?;
        let kept = joined.nrows().saturating_sub(self.past());
        *tail = joined.slice(s![kept.., ..]).to_owned();
        Ok(out.slice(s![past.., ..]).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 31 + j * 17 + seed * 7) as f32 * 0.37).sin()
        })
    }

    #[test]
    fn windows_are_apart_and_taps_end_at_the_token() {
        let (weight, x) = (values(3, 4, 1), values(9, 3, 2));
        let convolution = Convolution::new(weight.view());
        let windows = [0..6, 6..9];
        let y = convolution.forward(x.view(), &windows).unwrap();
        for window in windows {
            for t in window.clone() {
                for c in 0..3 {
                    let taps = (0..4).filter(|j| t + j >= window.start + 3);
                    let expected: f32 = taps.map(|j| weight[[c, j]] * x[[t + j - 3, c]]).sum();
                    assert!((y[[t, c]] - expected).abs() < 1e-6);
                }
            }
        }
        let window = std::slice::from_ref(&(0..9));
        assert!(convolution.forward(values(9, 2, 2).view(), window).is_err());
    }

    #[test]
    fn steps_give_the_rows_of_the_whole() {
        let (convolution, x) = (Convolution::new(values(3, 4, 1).view()), values(11, 3, 2));
        let whole = convolution.forward(x.view(), std::slice::from_ref(&(0..11))).unwrap();
        let mut tail = Array2::zeros((0, 3));
        for piece in [0..2, 2..3, 3..4, 4..9, 9..11] {
            let y = convolution.step(x.slice(s![piece.clone(), ..]), &mut tail).unwrap();
            assert_eq!(y, whole.slice(s![piece, ..]));
        }
        assert_eq!(tail.nrows(), 3);
    }
}
