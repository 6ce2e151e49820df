//! A borrowed MLP, the input of a device, and its computation product by product.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2};

use super::activation::{Activation, activate, gated};
use super::compute::Compute;
use crate::error::{Error, Result};

/// A borrowed projection, `y = W x + b` with `W: (out, in)`.
#[derive(Debug, Clone, Copy)]
pub struct LinearView<'a> {
    /// `W: (out, in)`.
    pub weight: ArrayView2<'a, f32>,
    /// `b: (out)`.
    pub bias: Option<ArrayView1<'a, f32>>,
}

impl LinearView<'_> {
    /// `X Wᵀ + b` for `X: (t, in)`: `(t, out)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn forward(&self, x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Array2<f32>> {
        project(self, x, compute)
    }
}

/// `W_down (act(W_gate x) ⊙ (W_up x))`, or `W_down act(W_up x)` without a gate; see
/// [`Activation::gate`].
#[derive(Debug, Clone, Copy)]
pub struct Mlp<'a> {
    /// `W_gate: (d_ff, d_model)`.
    pub gate: Option<LinearView<'a>>,
    /// `W_up: (d_ff, d_model)`.
    pub up: LinearView<'a>,
    /// `W_down: (d_model, d_ff)`.
    pub down: LinearView<'a>,
    /// The non-linearity.
    pub activation: Activation,
}

fn project<C: Compute + ?Sized>(
    linear: &LinearView<'_>,
    x: ArrayView2<'_, f32>,
    compute: &C,
) -> Result<Array2<f32>> {
    let mut out = Array2::zeros((x.nrows(), linear.weight.nrows()));
    compute.gemm(1.0, x, linear.weight.t(), 0.0, out.view_mut())?;
    if let Some(bias) = linear.bias {
        out += &bias;
    }
    Ok(out)
}

/// The default of [`Compute::hidden`].
pub(crate) fn hidden_by_parts<C: Compute + ?Sized>(
    mlp: &Mlp<'_>,
    x: ArrayView2<'_, f32>,
    compute: &C,
) -> Result<Array2<f32>> {
    let act = mlp.activation;
    let mut hidden = project(mlp.gate.as_ref().unwrap_or(&mlp.up), x, compute)?;
    let not_contiguous = || Error::bug("hidden activations have gaps in memory");
    let values = hidden.as_slice_mut().ok_or_else(not_contiguous)?;
    match &mlp.gate {
        None => activate(act, values),
        Some(_) => {
            let up = project(&mlp.up, x, compute)?;
            gated(act, values, up.as_slice().ok_or_else(not_contiguous)?);
        }
    }
    Ok(hidden)
}

/// The default of [`Compute::mlp`].
pub(crate) fn mlp_by_parts<C: Compute + ?Sized>(
    mlp: &Mlp<'_>,
    x: ArrayView2<'_, f32>,
    weights: Option<&[f32]>,
    mut out: ArrayViewMut2<'_, f32>,
    compute: &C,
) -> Result<()> {
    check_weights(weights, x.nrows())?;
    let mut hidden = compute.hidden(mlp, x)?;
    if let Some(weights) = weights {
        hidden.rows_mut().into_iter().zip(weights).for_each(|(mut row, w)| row *= *w);
    }
    compute.gemm(1.0, hidden.view(), mlp.down.weight.t(), 0.0, out.view_mut())?;
    add_bias(mlp.down.bias, weights, out);
    Ok(())
}

/// Fails unless there is one weight for each of `t` rows, or none at all.
pub(crate) fn check_weights(weights: Option<&[f32]>, t: usize) -> Result<()> {
    match weights {
        Some(weights) if weights.len() != t => Err(Error::shape("mlp weights", t, weights.len())),
        _ => Ok(()),
    }
}

/// `out ← out + w bᵀ`.
pub(crate) fn add_bias(
    bias: Option<ArrayView1<'_, f32>>,
    weights: Option<&[f32]>,
    mut out: ArrayViewMut2<'_, f32>,
) {
    let Some(bias) = bias else { return };
    for (i, mut row) in out.rows_mut().into_iter().enumerate() {
        row.scaled_add(weights.map_or(1.0, |w| w[i]), &bias);
    }
}
