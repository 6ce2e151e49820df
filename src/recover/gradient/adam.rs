//! Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) on one matrix.

use ndarray::{Array1, Array2};
use pulp::{Arch, Simd, WithSimd};

const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.999;
const EPSILON: f32 = 1e-8;

/// A trained matrix, its gradient and the running moments of it.
#[derive(Debug, Clone)]
pub(super) struct Param {
    pub(super) value: Array2<f32>,
    pub(super) gradient: Array2<f32>,
    mean: Array2<f32>,
    square: Array2<f32>,
    steps: i32,
}

impl Param {
    pub(super) fn new(value: Array2<f32>) -> Self {
        let value = value.as_standard_layout().into_owned();
        let zeros = Array2::zeros(value.dim());
        Self { gradient: zeros.clone(), mean: zeros.clone(), square: zeros, value, steps: 0 }
    }

    /// A bias, as a matrix of one row.
    pub(super) fn row(bias: Array1<f32>) -> Self {
        Self::new(bias.insert_axis(ndarray::Axis(0)))
    }

    /// The bias again.
    pub(super) fn to_row(&self) -> Array1<f32> {
        self.value.row(0).to_owned()
    }

    /// One step along the gradient: `W ← W − rate · m̂ / (√v̂ + ε)`.
    pub(super) fn step(&mut self, rate: f64) {
        self.steps += 1;
        let unbiased = 1.0 - f64::from(MEAN_DECAY).powi(self.steps);
        let spread = (1.0 - f64::from(SQUARE_DECAY).powi(self.steps)).sqrt();
        let parts = (
            self.value.as_slice_mut(),
            self.gradient.as_slice(),
            self.mean.as_slice_mut(),
            self.square.as_slice_mut(),
        );
        let (Some(value), Some(gradient), Some(mean), Some(square)) = parts else { return };
        let rate = (rate / unbiased) as f32;
        let update = Update { value, gradient, mean, square, rate, spread: (1.0 / spread) as f32 };
        Arch::new().dispatch(update);
    }
}

/// One pass over the four arrays, compiled for the vector registers of the machine.
struct Update<'a> {
    value: &'a mut [f32],
    gradient: &'a [f32],
    mean: &'a mut [f32],
    square: &'a mut [f32],
    rate: f32,
    spread: f32,
}

impl WithSimd for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { value, gradient, mean, square, rate, spread } = self;
        let moments = mean.iter_mut().zip(square);
        for ((w, g), (m, v)) in value.iter_mut().zip(gradient).zip(moments) {
            *m = MEAN_DECAY * *m + (1.0 - MEAN_DECAY) * g;
            *v = SQUARE_DECAY * *v + (1.0 - SQUARE_DECAY) * g * g;
            *w -= rate * *m / (v.sqrt() * spread + EPSILON);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_those_of_the_algorithm() {
        let start = Array2::from_shape_fn((3, 37), |(i, j)| ((i * 37 + j) as f32 * 0.7).sin());
        let mut param = Param::new(start.clone());
        let mut expected = start.mapv(|w| (f64::from(w), 0.0f64, 0.0f64));
        for t in 1..=5 {
            param.gradient = start.mapv(|w| (w * t as f32 * 3.0).cos());
            param.step(1e-2);
            expected.zip_mut_with(&param.gradient, |(w, m, v), &g| {
                let g = f64::from(g);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (mean, square) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.999f64.powi(t)));
                *w -= 1e-2 * mean / (square.sqrt() + 1e-8);
            });
        }
        let expected = expected.mapv(|(w, ..)| w as f32);
        approx::assert_abs_diff_eq!(param.value, expected, epsilon = 1e-5);
    }
}
