//! The tensors of a layer: names, types and shapes, as data.

use std::fmt;

use crate::tensor_file::Dtype;

use super::tensor::wrong_type;
use crate::error::{ErrorKind, Result};
use crate::model::LayerId;

/// The axes of a layer's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// Rows of the per-token tensors.
    T,
    /// Experts.
    N,
    /// Experts per token.
    K,
    /// Width of the residual stream.
    H,
    /// Hidden units of an expert.
    F,
}

use Axis::{F, H, K, N, T};

/// What a part may be stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Float,
    Wide,
    Int,
}

/// One tensor of a layer.
#[derive(Debug)]
pub(in crate::calibrate) struct Part {
    pub(super) name: &'static str,
    axes: &'static [Axis],
    kind: Kind,
}

const fn part(name: &'static str, axes: &'static [Axis], kind: Kind) -> Part {
    Part { name, axes, kind }
}

/// Every tensor that this crate knows; others are ignored.
pub(super) const PARTS: &[Part] = &[
    part("router_logits", &[T, N], Kind::Float),
    part("topk_indices", &[T, K], Kind::Int),
    part("topk_weights", &[T, K], Kind::Float),
    part("counts", &[N], Kind::Int),
    part("moe_input", &[T, H], Kind::Float),
    part("moe_output", &[T, H], Kind::Float),
    part("routed_output", &[T, H], Kind::Float),
    part("expert_out_norm", &[N], Kind::Float),
    part("expert_mean_gate", &[N], Kind::Float),
    part("reap_saliency", &[N], Kind::Float),
    part("expert_mean_output", &[N, H], Kind::Float),
    part("logit_gram", &[N, N], Kind::Wide),
    part("router_mass", &[N], Kind::Wide),
    part("grad.gate", &[N, F, H], Kind::Float),
    part("grad.up", &[N, F, H], Kind::Float),
    part("grad.down", &[N, H, F], Kind::Float),
    part("fisher.gate", &[N, F, H], Kind::Float),
    part("fisher.up", &[N, F, H], Kind::Float),
    part("fisher.down", &[N, H, F], Kind::Float),
];

/// Splits `layers.3.counts` into the layer and the known part; `None` for any other tensor.
pub(in crate::calibrate) fn split(name: &str) -> Option<(LayerId, &'static Part)> {
    PARTS.iter().find_map(|part| {
        let layer = name.strip_suffix(part.name)?.strip_suffix('.')?;
        let id: LayerId = layer.parse().ok()?;
        // `layers.03` and `layers.+3` would be other names of `layers.3`.
        (id.to_string() == layer).then_some((id, part))
    })
}

/// The sizes of a layer's axes, as far as its tensors tell them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sizes([Option<usize>; 5]);

impl Sizes {
    pub(super) fn get(&self, axis: Axis) -> Option<usize> {
        self.0[axis as usize]
    }

    pub(super) fn set(&mut self, axis: Axis, size: usize) {
        self.0[axis as usize] = Some(size);
    }

    /// Learns the axes of a part, or finds that it contradicts the parts before.
    pub(super) fn learn(&mut self, part: &Part, dtype: Dtype, shape: &[usize]) -> Result<()> {
        part.check_type(dtype)?;
        let before = *self;
        let fits = shape.len() == part.axes.len()
            && part
                .axes
                .iter()
                .zip(shape)
                .all(|(&axis, &size)| *self.0[axis as usize].get_or_insert(size) == size);
        if fits {
            return Ok(());
        }
        let reason = format!("shape: expected {}, found {shape:?}", Expected(part.axes, &before));
        Err(ErrorKind::Statistics { reason }.into())
    }
}

impl Part {
    fn check_type(&self, dtype: Dtype) -> Result<()> {
        let float = dtype.is_float();
        match self.kind {
            Kind::Float if float => Ok(()),
            Kind::Float => Err(wrong_type(dtype, "F32, BF16, F16")),
            Kind::Wide if float || dtype == Dtype::F64 => Ok(()),
            Kind::Wide => Err(wrong_type(dtype, "F64, F32, BF16, F16")),
            Kind::Int if [Dtype::I32, Dtype::I64].contains(&dtype) => Ok(()),
            Kind::Int => Err(wrong_type(dtype, "I32, I64")),
        }
    }
}

/// `[T = 682, N]`: axes with the sizes known so far.
struct Expected<'a>(&'a [Axis], &'a Sizes);

impl fmt::Display for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, &axis) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            match self.1.get(axis) {
                Some(size) => write!(f, "{comma}{axis:?} = {size}")?,
                None => write!(f, "{comma}{axis:?}")?,
            }
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_into_layer_and_part() {
        let (id, part) = split("encoder.layers.1.grad.up").unwrap();
        assert_eq!((id.to_string().as_str(), part.name), ("encoder.layers.1", "grad.up"));
        for other in ["token_ids", "layers.03.counts", "layers.+3.counts", "layers.3.median"] {
            assert!(split(other).is_none(), "{other}");
        }
    }

    #[test]
    fn contradicting_shapes_are_named_by_axis() {
        let find = |name: &str| PARTS.iter().find(|p| p.name == name).unwrap();
        let mut sizes = Sizes::default();
        sizes.learn(find("counts"), Dtype::I32, &[8]).unwrap();
        let error =
            sizes.learn(find("router_logits"), Dtype::named("F32").unwrap(), &[5, 9]).unwrap_err();
        assert!(error.to_string().ends_with("expected [T, N = 8], found [5, 9]"), "{error}");
        let error = sizes.learn(find("counts"), Dtype::named("F32").unwrap(), &[8]).unwrap_err();
        assert!(error.to_string().contains("F32; supported: I32, I64"), "{error}");
    }
}
