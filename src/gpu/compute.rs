//! The implementation of [`Compute`] by the kernels.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use super::device_matrix::Matrix;
use super::mlp::Until;
use super::{Gpu, gemm, gram, mlp, sum};
use crate::error::{Error, Result};
use crate::linalg::{
    Compute, DeviceMatrix, Mlp, Product, Term, add_bias, check_weights, hidden_by_parts,
    mlp_by_parts,
};

impl Compute for Gpu {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn gemm(
        &self,
        alpha: f32,
        a: ArrayView2<'_, f32>,
        b: ArrayView2<'_, f32>,
        beta: f32,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<()> {
        gemm::products(&self.device, "gemm", &[Product { alpha, a, b }], beta, out)
    }

    fn gemm_sum(&self, terms: &[Product<'_>], out: ArrayViewMut2<'_, f32>) -> Result<()> {
        gemm::products(&self.device, "gemm", terms, 0.0, out)
    }

    fn add_gram(&self, x: ArrayView2<'_, f32>, sum: &mut Array2<f64>) -> Result<()> {
        gram::add_gram(&self.device, x, sum)
    }

    fn weighted_sum(&self, terms: &[Term<'_>]) -> Result<Array2<f32>> {
        sum::weighted_sum(&self.device, terms)
    }

    fn hidden(&self, parts: &Mlp<'_>, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        mlp::check(parts, x)?;
        if !mlp::fits(&self.device, parts) {
            return hidden_by_parts(parts, x, self);
        }
        let mut out = Array2::zeros((x.nrows(), parts.up.weight.nrows()));
        mlp::run(&self.device, parts, x, None, Until::Hidden, out.view_mut())?;
        Ok(out)
    }

    fn mlp(
        &self,
        parts: &Mlp<'_>,
        x: ArrayView2<'_, f32>,
        weights: Option<&[f32]>,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<()> {
        mlp::check(parts, x)?;
        check_weights(weights, x.nrows())?;
        let expected = (x.nrows(), parts.down.weight.nrows());
        if out.dim() != expected {
            return Err(Error::shape("mlp", expected, out.dim()));
        }
        if !mlp::fits(&self.device, parts) {
            return mlp_by_parts(parts, x, weights, out, self);
        }
        mlp::run(&self.device, parts, x, weights, Until::Output, out.view_mut())?;
        add_bias(parts.down.bias, weights, out);
        Ok(())
    }

    fn fuses(&self) -> bool {
        true
    }

    fn upload<'a>(&'a self, a: ArrayView2<'a, f32>) -> Result<Option<Box<dyn DeviceMatrix + 'a>>> {
        Ok(Some(Box::new(Matrix::new(&self.device, a)?)))
    }

    /// The device itself: its queue takes turns, and while it works on one task's matrices the
    /// others upload theirs.
    fn per_task(&self) -> Arc<dyn Compute> {
        Arc::new(self.clone())
    }
}
