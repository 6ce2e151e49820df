//! The MLP that every token visits beside its routed experts.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::expert::add_expert;
use crate::error::{Error, Result};
use crate::families::{DecoderSpec, SharedSpec};
use crate::forward::load::Loader;
use crate::forward::math::sigmoid;
use crate::model::Expert;
use crate::stage::Context;

/// The MLP that every token visits beside its routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    expert: Expert,
    /// `w: (d_model)` of the factor `sigmoid(w · x)`.
    gate: Option<Array1<f32>>,
}

impl Shared {
    pub(crate) fn load(mlp: &Loader<'_>, spec: &DecoderSpec) -> Result<Option<Self>> {
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
