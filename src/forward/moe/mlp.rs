//! One MLP on a block of tokens, whatever its weights lie in.

use ndarray::{ArrayView1, ArrayView2};

use super::scratch::{Pool, Scratch};
use crate::error::Result;
use crate::forward::math::{activate, gated};
use crate::linalg::Compute;
use crate::model::Activation;

/// `y = W x + b`.
pub(crate) trait Projection {
    /// `X Wᵀ`.
    fn multiply<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>>;

    /// `b`.
    fn bias(&self) -> Option<ArrayView1<'_, f32>>;
}

/// The projections of an MLP.
pub(crate) struct Parts<'p, P> {
    pub(crate) gate: Option<&'p P>,
    pub(crate) up: &'p P,
    pub(crate) down: &'p P,
    pub(crate) activation: Activation,
}

impl<P: Projection> Parts<'_, P> {
    /// `w ⊙ E(X)` for a block `X: (t, d_model)` and one weight per token: `(t, d_model)`.
    ///
    /// The weight is applied to the hidden activations, which are fewer than the outputs where
    /// experts are narrow, and to the bias of the down projection.
    pub(crate) fn weighted<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        weights: Option<&[f32]>,
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>> {
        let mut hidden = project(self.gate.unwrap_or(self.up), x, pool, compute)?;
        if self.gate.is_some() {
            let mut up = project(self.up, x, pool, compute)?;
            gated(self.activation, hidden.values(), up.values());
        } else {
            activate(self.activation, hidden.values());
        }
        if let Some(weights) = weights {
            let width = hidden.view().ncols().max(1);
            for (row, w) in hidden.values().chunks_exact_mut(width).zip(weights) {
                row.iter_mut().for_each(|h| *h *= w);
            }
        }
        let mut out = self.down.multiply(hidden.view(), pool, compute)?;
        if let Some(bias) = self.down.bias() {
            for (i, mut row) in out.view_mut().rows_mut().into_iter().enumerate() {
                row.scaled_add(weights.map_or(1.0, |w| w[i]), &bias);
            }
        }
        Ok(out)
    }
}

/// `X Wᵀ + b`.
fn project<'a, P: Projection>(
    projection: &P,
    x: ArrayView2<'_, f32>,
    pool: &'a Pool,
    compute: &dyn Compute,
) -> Result<Scratch<'a>> {
    let mut out = projection.multiply(x, pool, compute)?;
    if let Some(bias) = projection.bias() {
        let mut out = out.view_mut();
        out += &bias;
    }
    Ok(out)
}
