//! Reads the weights of a layer and checks each against the shape that the configuration implies.

use ndarray::Array2;

use crate::error::{Error, Locate, Result};
use crate::families::{NormKind, NormSpec};
use crate::forward::norm::RmsNorm;
use crate::model::{Activation, Expert, Finite, Linear, TensorSource};

/// Tensors below one name prefix.
pub(crate) struct Loader<'a> {
    source: &'a dyn TensorSource,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(source: &'a dyn TensorSource, prefix: impl Into<String>) -> Self {
        Self { source, prefix: prefix.into() }
    }

    /// Tensors below `name.` of this prefix.
    pub(crate) fn at(&self, name: &str) -> Loader<'a> {
        Self::new(self.source, format!("{}{name}.", self.prefix))
    }

    /// A finite matrix of `(rows, cols)`.
    pub(crate) fn matrix(&self, name: &str, shape: (usize, usize)) -> Result<Array2<f32>> {
        let name = format!("{}{name}", self.prefix);
        let read = || {
            let matrix = self.source.matrix(&name)?;
            if matrix.dim() != shape {
                return Err(Error::shape("weight", shape, matrix.dim()));
            }
            matrix.check_finite("weight")?;
            Ok(matrix)
        };
        read().in_tensor(&name)
    }

    /// A finite vector.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<ndarray::Array1<f32>> {
        let name = format!("{}{name}", self.prefix);
        let read = || {
            let vector = self.source.vector(&name)?;
            if vector.len() != len {
                return Err(Error::shape("weight", len, vector.len()));
            }
            vector.check_finite("weight")?;
            Ok(vector)
        };
        read().in_tensor(&name)
    }

    /// `name.weight: (out, in)` and, if asked for, `name.bias: (out)`.
    pub(crate) fn linear(&self, name: &str, shape: (usize, usize), bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), shape)?;
        let bias = bias.then(|| self.vector(&format!("{name}.bias"), shape.0)).transpose()?;
        Ok(Linear { weight, bias })
    }

    /// `name.weight: (width)`.
    pub(crate) fn norm(&self, name: &str, width: usize, norm: NormSpec) -> Result<RmsNorm> {
        let weight = self.vector(&format!("{name}.weight"), width)?;
        Ok(match norm.kind {
            NormKind::Rms => RmsNorm::new(weight, norm.eps),
            NormKind::ZeroCentredRms => RmsNorm::new(weight + 1.0, norm.eps),
        })
    }

    /// A gated MLP: `gate_proj`, `up_proj`: `(d_ff, d_model)`, `down_proj: (d_model, d_ff)`.
    pub(crate) fn gated(
        &self,
        (d, f): (usize, usize),
        act: Activation,
        bias: bool,
    ) -> Result<Expert> {
        let gate = self.linear("gate_proj", (f, d), bias)?;
        let up = self.linear("up_proj", (f, d), bias)?;
        Expert::new(Some(gate), up, self.linear("down_proj", (d, f), bias)?, act)
    }

    /// A two-matrix MLP: `wi: (d_ff, d_model)`, `wo: (d_model, d_ff)`.
    pub(crate) fn two(&self, (d, f): (usize, usize), act: Activation) -> Result<Expert> {
        let wi = self.linear("wi", (f, d), false)?;
        Expert::new(None, wi, self.linear("wo", (d, f), false)?, act)
    }
}
