//! One MLP on a block of tokens: the kernel under routed, shared and dense experts.

use ndarray::{Array2, ArrayView1, ArrayView2, s};

use super::mlp::{Parts, Projection};
use super::scratch::{Pool, Scratch};
use super::sum::Kernel;
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::{Expert, ExpertView, LinearView};
use crate::par;
use crate::stage::Context;

/// Tokens that one task sends through an MLP.
pub(crate) const BLOCK: usize = 512;

/// `w ⊙ E(X)` for a block `X: (t, d_model)` and one weight per token: `(t, d_model)`.
fn weighted_expert<'a>(
    expert: &ExpertView<'_>,
    x: ArrayView2<'_, f32>,
    weights: Option<&[f32]>,
    pool: &'a Pool,
    compute: &dyn Compute,
) -> Result<Scratch<'a>> {
    if compute.fuses() {
        let mut out = pool.take(x.nrows(), expert.d_model());
        compute.mlp(&expert.mlp(), x, weights, out.view_mut())?;
        return Ok(out);
    }
    let ExpertView { gate, up, down, activation } = expert;
    let parts = Parts { gate: gate.as_ref(), up, down, activation: *activation };
    parts.weighted(x, weights, pool, compute)
}

impl Kernel for Expert {
    fn weighted<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        weights: &[f32],
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>> {
        weighted_expert(&self.view(), x, Some(weights), pool, compute)
    }
}

impl Projection for LinearView<'_> {
    fn multiply<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>> {
        let mut out = pool.take(x.nrows(), self.weight.nrows());
        compute.gemm(1.0, x, self.weight.t(), 0.0, out.view_mut())?;
        Ok(out)
    }

    fn bias(&self) -> Option<ArrayView1<'_, f32>> {
        self.bias
    }
}

/// `out ← out + w ⊙ E(X)` for all tokens, in parallel blocks.
pub(crate) fn add_expert(
    expert: &ExpertView<'_>,
    x: ArrayView2<'_, f32>,
    weights: Option<&[f32]>,
    out: &mut Array2<f32>,
    cx: &Context,
) -> Result<()> {
    // Blocks are computed a fixed number at a time, so that few outputs are held at once.
    const WAVE: usize = 16;
    let (t, single, pool) = (x.nrows(), cx.per_task(), Pool::default());
    if out.dim() != (t, expert.d_model()) {
        return Err(Error::shape("expert output", (t, expert.d_model()), out.dim()));
    }
    for wave in (0..t.div_ceil(BLOCK)).step_by(WAVE) {
        let rows = |i: usize| (wave + i) * BLOCK..((wave + i + 1) * BLOCK).min(t);
        let blocks = WAVE.min(t.div_ceil(BLOCK) - wave);
        let parts = par::map(blocks, |i| {
            let weights = weights.map(|w| &w[rows(i)]);
            let x = x.slice(s![rows(i), ..]);
            weighted_expert(expert, x, weights, &pool, single.compute())
        })?;
        for (i, part) in parts.iter().enumerate() {
            let mut target = out.slice_mut(s![rows(i), ..]);
            target += &part.view();
        }
    }
    Ok(())
}
