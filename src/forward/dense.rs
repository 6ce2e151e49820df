//! One MLP on a block of tokens: the kernel under routed, shared and dense experts.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::load::Loader;
use super::math::{activate, gated, sigmoid};
use super::spec::{SharedSpec, Spec};
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::{Expert, ExpertView};
use crate::par;
use crate::stage::Context;

/// Tokens that one task sends through an MLP.
pub(super) const BLOCK: usize = 512;

/// `w ⊙ E(X)` for a block `X: (t, d_model)` and one weight per token: `(t, d_model)`.
///
/// The weight is applied to the hidden activations, which are fewer than the outputs where experts
/// are narrow, and to the bias of the down projection.
pub(super) fn weighted_expert(
    expert: &ExpertView<'_>,
    x: ArrayView2<'_, f32>,
    weights: Option<&[f32]>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let mut hidden = expert.gate.as_ref().unwrap_or(&expert.up).forward(x, compute)?;
    let up = expert.gate.is_some().then(|| expert.up.forward(x, compute)).transpose()?;
    let width = hidden.ncols();
    let Some(values) = hidden.as_slice_mut() else {
        return Err(Error::shape("expert block", "rows in memory order", x.dim()));
    };
    match up.as_ref().and_then(|up| up.as_slice()) {
        Some(up) => gated(expert.activation, values, up),
        None => activate(expert.activation, values),
    }
    if let Some(weights) = weights {
        for (row, w) in values.chunks_exact_mut(width.max(1)).zip(weights) {
            row.iter_mut().for_each(|h| *h *= w);
        }
    }
    let mut out = Array2::zeros((x.nrows(), expert.d_model()));
    compute.gemm(1.0, hidden.view(), expert.down.weight.t(), 0.0, out.view_mut())?;
    if let Some(bias) = expert.down.bias {
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            row.scaled_add(weights.map_or(1.0, |w| w[i]), &bias);
        }
    }
    Ok(out)
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
    let (t, single) = (x.nrows(), cx.per_task());
    if out.dim() != (t, expert.d_model()) {
        return Err(Error::shape("expert output", (t, expert.d_model()), out.dim()));
    }
    for wave in (0..t.div_ceil(BLOCK)).step_by(WAVE) {
        let rows = |i: usize| (wave + i) * BLOCK..((wave + i + 1) * BLOCK).min(t);
        let blocks = WAVE.min(t.div_ceil(BLOCK) - wave);
        let parts = par::map(blocks, |i| {
            let weights = weights.map(|w| &w[rows(i)]);
            weighted_expert(expert, x.slice(s![rows(i), ..]), weights, single.compute())
        })?;
        for (i, part) in parts.iter().enumerate() {
            let mut target = out.slice_mut(s![rows(i), ..]);
            target += part;
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
