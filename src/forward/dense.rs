//! One MLP on a block of tokens: the kernel under routed, shared and dense experts.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use super::load::Loader;
use super::math::sigmoid;
use super::mlp::{Parts, Projection};
use super::moe::Kernel;
use super::scratch::{Pool, Scratch};
use super::spec::{SharedSpec, Spec};
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::{Expert, ExpertView, LinearView};
use crate::par;
use crate::stage::Context;

/// Tokens that one task sends through an MLP.
pub(super) const BLOCK: usize = 512;

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
pub(super) fn add_expert(
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

/// The MLP that every token visits beside its routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    expert: Expert,
    /// `w: (d_model)` of the factor `sigmoid(w · x)`.
    gate: Option<Array1<f32>>,
}

impl Shared {
    pub(super) fn load(mlp: &Loader<'_>, spec: &Spec) -> Result<Option<Self>> {
        let (d, act, bias) = (spec.d_model, spec.activation, spec.mlp_bias);
        Ok(match spec.shared {
            SharedSpec::None => None,
            SharedSpec::Plain(f) => {
                let expert = mlp.at("shared_experts").gated((d, f), act, bias)?;
                Some(Self { expert, gate: None })
            }
            SharedSpec::SigmoidGated(f) => {
                let expert = mlp.at("shared_expert").gated((d, f), act, bias)?;
                let gate = mlp.matrix("shared_expert_gate.weight", (1, d))?;
                Some(Self { expert, gate: Some(gate.index_axis_move(Axis(0), 0)) })
            }
        })
    }

    /// The MLP.
    pub fn expert(&self) -> &Expert {
        &self.expert
    }

    /// `out ← out + S(X)` for `X: (t, d_model)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the widths do not fit.
    pub fn add_to(
        &self,
        x: ArrayView2<'_, f32>,
        out: &mut Array2<f32>,
        cx: &Context,
    ) -> Result<()> {
        let weights = match &self.gate {
            None => None,
            Some(gate) if gate.len() != x.ncols() => {
                return Err(Error::shape("shared expert gate", gate.len(), x.ncols()));
            }
            Some(gate) => Some(x.dot(gate).mapv(sigmoid).to_vec()),
        };
        add_expert(&self.expert.view(), x, weights.as_deref(), out, cx)
    }
}
