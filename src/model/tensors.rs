//! The source of a forward pass's weights: the interface between checkpoint and forward.

use ndarray::{Array1, Array2};

use super::expert::FactoredLayer;
use super::layer::{LayerId, MergedLayer};
use crate::error::Result;

/// Where a forward pass gets its weights: tensors by name, MoE layers whole.
///
/// Values arrive as `f32`, whatever the element type on disk. An implementor reads on demand and
/// keeps nothing: the forward pass asks for each tensor once per pass, layer by layer.
pub trait TensorSource: Sync {
    /// Whether there is a tensor of this name.
    fn has(&self, name: &str) -> bool;

    /// The shape of a tensor; `None` when there is none of this name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// A tensor of two axes, or of three with one of length 1 in the middle (the weights of a
    /// convolution by channel), converted to `f32`.
    ///
    /// # Errors
    /// When it is missing or has another number of axes; those of reading it.
    fn matrix(&self, name: &str) -> Result<Array2<f32>>;

    /// A tensor of one axis, converted to `f32`.
    ///
    /// # Errors
    /// When it is missing or has another number of axes; those of reading it.
    fn vector(&self, name: &str) -> Result<Array1<f32>>;

    /// A whole MoE layer; the identity grouping when it was not merged.
    ///
    /// # Errors
    /// When the layer is not sparse or its tensors do not form a layer.
    fn moe(&self, layer: LayerId) -> Result<MergedLayer>;

    /// A MoE layer whose experts lie in factors, as they lie; `None` for any other layer.
    ///
    /// # Errors
    /// As [`moe`](Self::moe).
    fn moe_in_factors(&self, _layer: LayerId) -> Result<Option<FactoredLayer>> {
        Ok(None)
    }

    /// Whether this layer is sparse.
    fn is_moe(&self, layer: LayerId) -> bool;

    /// The parsed `config.json` of the text model: an outer wrapper has been taken off.
    fn config(&self) -> &serde_json::Value;

    /// What comes before `layers.0.…` in tensor names: `model.`, `model.language_model.`, …; empty
    /// for encoder-decoder models.
    fn prefix(&self) -> &str;

    /// Says that nothing whose name starts so will be read again in this pass.
    fn release(&self, _name_or_prefix: &str) {}
}

impl<T: TensorSource + ?Sized> TensorSource for &T {
    fn has(&self, name: &str) -> bool {
        (**self).has(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        (**self).shape(name)
    }

    fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        (**self).matrix(name)
    }

    fn vector(&self, name: &str) -> Result<Array1<f32>> {
        (**self).vector(name)
    }

    fn moe(&self, layer: LayerId) -> Result<MergedLayer> {
        (**self).moe(layer)
    }

    fn moe_in_factors(&self, layer: LayerId) -> Result<Option<FactoredLayer>> {
        (**self).moe_in_factors(layer)
    }

    fn is_moe(&self, layer: LayerId) -> bool {
        (**self).is_moe(layer)
    }

    fn config(&self) -> &serde_json::Value {
        (**self).config()
    }

    fn prefix(&self) -> &str {
        (**self).prefix()
    }

    fn release(&self, name_or_prefix: &str) {
        (**self).release(name_or_prefix);
    }
}
