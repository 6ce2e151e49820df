//! Numbers, matrices and projections from a seed.
#![allow(clippy::should_implement_trait)] // Not an iterator: it has no end.

use mcsmoe::model::Linear;
use ndarray::{Array1, Array2};

/// Numbers in −1..1 from a seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        ((self.0 >> 33) as f64 / (1u64 << 30) as f64 - 1.0) as f32
    }

    pub(crate) fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, cols), || self.next())
    }

    pub(crate) fn linear(&mut self, rows: usize, cols: usize) -> Linear {
        let weight = self.matrix(rows, cols);
        Linear { weight, bias: Some(Array1::from_shape_simple_fn(rows, || self.next())) }
    }
}
