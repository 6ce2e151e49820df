//! Which stack of layers is the language model, and which tensors only predict further tokens.
//!
//! A checkpoint may hold more than one stack: of images or sound, of an encoder inside such a
//! tower, of a talker. Names differ, so the stack is found by what it holds: layers with experts,
//! as many as the config says. Everything outside it is copied.

use std::collections::{BTreeMap, BTreeSet};

use super::names;
use crate::checkpoint::config::{Config, MTP, mismatch};
use crate::checkpoint::read::Store;
use crate::error::{Error, Result};
use crate::families::Layout;
use crate::model::{LayerId, Stack};

/// What the stack of a language model is, as far as the config says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depth {
    /// Layers of the model itself.
    layers: Option<usize>,
    /// Layers behind them that predict further tokens.
    predicting: usize,
}

impl Depth {
    /// Reads `num_hidden_layers` and the number of multi-token-prediction layers.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) when one is not a whole number.
    pub(crate) fn read(config: &Config) -> Result<Self> {
        let mut predicting = 0;
        for key in MTP {
            predicting = predicting.max(config.integer(key)?.unwrap_or(0));
        }
        Ok(Self { layers: config.integer("num_hidden_layers")?, predicting })
    }

    /// The number of layers of the model itself.
    pub(super) fn layers(self) -> Option<usize> {
        self.layers
    }
}

/// What a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Belongs {
    /// The language model, or to no stack.
    Model,
    /// Multi-token prediction.
    Prediction,
    /// Another stack, which is copied.
    Elsewhere,
}

/// The stack of a decoder-only language model.
#[derive(Debug)]
pub(super) struct LanguageStack {
    /// What stands before the number of a layer, e.g. `model.layers.`; `None` without such a stack.
    start: Option<String>,
    depth: Depth,
}

/// Most missing layers that an error names.
const MOST_NAMED: usize = 64;

impl LanguageStack {
    /// Finds the stack with experts; of several the one as deep as the config says, of those the
    /// one that is named after language.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) when two could be meant;
    /// [`Config`](crate::ErrorKind::Config), naming all layers, when its layers are not those of
    /// the config.
    pub(super) fn find(store: &Store, layouts: &[&'static Layout], depth: Depth) -> Result<Self> {
        let mut stacks: BTreeMap<&str, (BTreeSet<usize>, bool)> = BTreeMap::new();
        let names = store.tensors().iter().map(|tensor| &*tensor.entry.name);
        for name in names.filter(|name| !names_prediction(name)) {
            let Some((start, index, rest)) = causal(name) else { continue };
            let (layers, experts) = stacks.entry(start).or_default();
            layers.insert(index);
            *experts |=
                layouts.iter().any(|l| l.part(rest).is_some()) || names::looks_like_experts(name);
        }
        let with_experts: Vec<&str> =
            stacks.iter().filter(|(_, (_, experts))| *experts).map(|(start, _)| *start).collect();
        let deep_enough = |start: &&&str| {
            let expected = depth.layers.unwrap_or(0);
            let found = stacks[**start].0.len();
            (expected..=expected.saturating_add(depth.predicting)).contains(&found)
        };
        let of_language = |start: &&&str| {
            ["language", "text", "thinker", "llm"].iter().any(|word| start.contains(word))
        };
        let start = match &with_experts[..] {
            [] => None,
            [one] => Some(*one),
            several => {
                let deep: Vec<&&str> = several.iter().filter(deep_enough).collect();
                let left = if deep.is_empty() { several.iter().collect() } else { deep };
                let named: Vec<&&str> = left.iter().copied().filter(of_language).collect();
                match (&left[..], &named[..]) {
                    ([one], _) | (_, [one]) => Some(**one),
                    _ => {
                        let reason = format!("two sets of experts: {}", several.join(" and "));
                        return Err(Error::malformed("MoE model", reason));
                    }
                }
            }
        };
        let this = Self { start: start.map(str::to_owned), depth };
        if let Some(start) = start {
            this.check_depth(store, &stacks[start].0)?;
        }
        Ok(this)
    }

    /// Checks that the layers `found` are those of the config, and those behind them prediction.
    fn check_depth(&self, store: &Store, found: &BTreeSet<usize>) -> Result<()> {
        let Some(expected) = self.depth.layers else { return Ok(()) };
        let missing = expected - found.range(..expected).count();
        if missing > 0 {
            // A damaged config may say any number.
            let first = (0..expected).filter(|i| !found.contains(i)).take(MOST_NAMED);
            let first: Vec<String> = first.map(|i| i.to_string()).collect();
            let more = match missing - first.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let stated = format!("{expected} layers in the tensors");
            let lost = format!("none of layer {}{more}", first.join(", "));
            return Err(mismatch("num_hidden_layers", &stated, lost));
        }
        let predicts = |layer: usize| {
            let of_layer = |name: &str| {
                let (start, index, rest) = causal(name)?;
                (Some(start) == self.start.as_deref() && index == layer).then_some(rest.to_owned())
            };
            let names = store.tensors().iter().map(|tensor| &*tensor.entry.name);
            names.filter_map(of_layer).any(|rest| {
                ["eh_proj", "enorm", "hnorm", "shared_head", "mtp"]
                    .iter()
                    .any(|word| rest.starts_with(word))
            })
        };
        let beyond = found.range(expected.saturating_add(self.depth.predicting)..);
        let left: Vec<String> =
            beyond.filter(|layer| !predicts(**layer)).map(|i| i.to_string()).collect();
        if left.is_empty() {
            return Ok(());
        }
        let stated = format!("{expected} layers in the tensors, or a key that says which predict");
        Err(mismatch("num_hidden_layers", &stated, format!("also layer {}", left.join(", "))))
    }

    /// What a tensor belongs to.
    pub(super) fn belongs(&self, name: &str) -> Belongs {
        if names_prediction(name) {
            return Belongs::Prediction;
        }
        match (causal(name), self.start.as_deref()) {
            (Some((start, ..)), Some(own)) if start != own => Belongs::Elsewhere,
            (Some((_, index, _)), Some(_)) if self.depth.layers.is_some_and(|n| index >= n) => {
                Belongs::Prediction
            }
            _ => Belongs::Model,
        }
    }
}

/// The start of the stack, the number of the layer and the rest of a tensor's name; `None` outside
/// stacks and in encoder-decoder models.
fn causal(name: &str) -> Option<(&str, usize, &str)> {
    let (LayerId { stack, index }, at, rest) = names::site(name)?;
    let start = name[..at].strip_suffix(&format!("{index}."))?;
    (stack == Stack::Causal).then_some((start, index, rest))
}

/// Whether a part of a name says that the tensor predicts further tokens: `mtp.layers.0`,
/// `model.mtp_block`, `nextn`, `eagle`.
fn names_prediction(name: &str) -> bool {
    name.split('.').any(|part| {
        part.starts_with("mtp") || part == "eagle" || part == "nextn" || part.starts_with("nextn_")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prediction_is_what_a_name_says() {
        for name in [
            "mtp.layers.0.mlp.experts.1.up_proj.weight",
            "model.language_model.mtp.fc.weight",
            "mtp_block.layers.0.input_layernorm.weight",
            "model.mtp_layers.0.mlp.gate.weight",
            "model.nextn.layers.0.mlp.gate.weight",
            "eagle.layers.0.mlp.gate.weight",
        ] {
            assert!(names_prediction(name), "{name}");
        }
        assert!(!names_prediction("model.layers.0.mlp.gate.weight"));
        let name = "model.qwen2_model.model.layers.3.mlp.up_proj.weight";
        assert_eq!(
            causal(name),
            Some(("model.qwen2_model.model.layers.", 3, "mlp.up_proj.weight"))
        );
    }
}
