//! The door to the forward pass: tensors by name, MoE layers whole, and the text model's config.
//!
//! What is read is converted to `f32` and owned by the caller, so the pages that it came from are
//! given back at once: of a model of any size only what is being computed with is resident.

use ndarray::{Array1, Array2};
use serde_json::{Map, Value};

use super::checkpoint::Checkpoint;
use super::store::Store;
use super::weights;
use crate::checkpoint::config::{Config, NATIVE, Native};
use crate::checkpoint::layout::{LayerTensors, Piece, names};
use crate::error::{Error, Locate, Result};
use crate::model::{FactoredLayer, LayerId, MergedLayer, Stack, TensorSource};

/// What a forward pass needs to know of the text model inside a checkpoint.
#[derive(Debug)]
pub(crate) struct TextModel {
    config: Value,
    prefix: String,
}

impl TextModel {
    pub(crate) fn new(
        config: &Config,
        native: Option<&Native>,
        store: &Store,
        layers: &[LayerTensors],
    ) -> Self {
        let prefix = layers.first().map_or("", |layer| prefix(&store.entry(layer.router).name));
        Self { config: language(config, native), prefix: prefix.to_owned() }
    }
}

/// The config of the language model. In a native folder model type and classes are again those of
/// the original.
fn language(config: &Config, native: Option<&Native>) -> Value {
    let mut keys: Map<String, Value> = config.language().as_object().cloned().unwrap_or_default();
    if let Some(native) = native {
        keys.remove(NATIVE);
        // A wrapper's language model has a type of its own, which is still there.
        if keys.get("model_type").is_some_and(|name| name == NATIVE) {
            keys.insert("model_type".into(), native.base_model_type.clone());
        }
        keys.insert("architectures".into(), native.base_architectures.clone());
    }
    Value::Object(keys)
}

/// What stands before `layers.0.…` in a tensor's name; nothing in encoder-decoder models.
fn prefix(name: &str) -> &str {
    match names::site(name) {
        Some((id, at, _)) if id.stack == Stack::Causal => {
            name[..at].strip_suffix(&format!("layers.{}.", id.index)).unwrap_or("")
        }
        _ => "",
    }
}

impl Checkpoint {
    fn find(&self, name: &str) -> Result<usize> {
        let missing = || Error::malformed("checkpoint", "there is no such tensor");
        self.store.get(name).ok_or_else(missing).in_tensor(name).in_file(&self.dir)
    }

    /// All values of a tensor with `axes` axes and its shape; its pages are given back.
    fn whole<const N: usize>(&self, name: &str) -> Result<([usize; N], Vec<f32>)> {
        let tensor = self.find(name)?;
        let shape = &self.store.entry(tensor).shape;
        // Convolutions by channel have an axis of length 1 in the middle.
        let squeezed: Vec<usize> = match shape[..] {
            [first, 1, last] if N == 2 => vec![first, last],
            _ => shape.clone(),
        };
        let Ok(shape) = <[usize; N]>::try_from(&squeezed[..]) else {
            let expected = format!("{N} axes");
            return Err(Error::shape("tensor", expected, shape))
                .in_tensor(name)
                .in_file(self.store.path(tensor));
        };
        let piece = Piece { tensor, start: 0, rows: 1, cols: shape.iter().product() };
        let values = weights::values(&self.store, piece)?;
        self.store.release(tensor, 0..self.store.bytes(tensor).len());
        Ok((shape, values))
    }
}

impl TensorSource for Checkpoint {
    fn has(&self, name: &str) -> bool {
        self.store.get(name).is_some()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.store.get(name).map(|tensor| self.store.entry(tensor).shape.clone())
    }

    fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        let ([rows, cols], values) = self.whole::<2>(name)?;
        let found = values.len();
        Array2::from_shape_vec((rows, cols), values)
            .map_err(|_| Error::shape("matrix", (rows, cols), found))
            .in_tensor(name)
    }

    fn vector(&self, name: &str) -> Result<Array1<f32>> {
        Ok(Array1::from(self.whole::<1>(name)?.1))
    }

    fn moe(&self, layer: LayerId) -> Result<MergedLayer> {
        let merged = self.read_merged(layer)?;
        Self::release(self, layer);
        Ok(merged)
    }

    fn moe_in_factors(&self, layer: LayerId) -> Result<Option<FactoredLayer>> {
        let factored = self.read_factored(layer)?;
        if factored.is_some() {
            Self::release(self, layer);
        }
        Ok(factored)
    }

    fn is_moe(&self, layer: LayerId) -> bool {
        self.layer(layer).is_ok()
    }

    /// As on disk, but without a wrapper, and with the original model type in a native folder.
    fn config(&self) -> &Value {
        &self.text.config
    }

    fn prefix(&self) -> &str {
        &self.text.prefix
    }

    fn release(&self, name_or_prefix: &str) {
        for (at, tensor) in self.store.tensors().iter().enumerate() {
            if tensor.entry.name.starts_with(name_or_prefix) {
                self.store.release(at, 0..tensor.bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_before_the_layers() {
        for (name, expected) in [
            ("model.layers.3.mlp.gate.weight", "model."),
            ("model.language_model.layers.0.mlp.gate.weight", "model.language_model."),
            ("language_model.model.layers.12.mlp.gate.weight", "language_model.model."),
            ("layers.0.mlp.gate.weight", ""),
            ("encoder.block.1.layer.1.mlp.router.classifier.weight", ""),
        ] {
            assert_eq!(prefix(name), expected);
        }
    }
}
