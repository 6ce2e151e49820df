//! What a folder will hold, or must hold, and what becomes of every tensor of its source: known
//! from the headers and a plan, before anything is merged and after.

use std::collections::HashMap;

use ndarray::ArrayView1;

use super::companion_files::companion_files;
use super::dequantise;
use super::layout_plan::Plan;
use super::request::{Export, WritePlan};
use super::target_config;
use crate::checkpoint::layout::LayerTensors;
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, Locate, Result};
use crate::model::{Finite, Grouping, LayerId};

/// The folder that a [`Writer`](crate::checkpoint::Writer) makes of a source and a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct FolderListing {
    /// Its tensors, in the order of files and places.
    pub tensors: Vec<ListedTensor>,
    /// Names and sizes in bytes of its files of tensors.
    pub files: Vec<(String, u64)>,
    /// The text of its `config.json`.
    pub config: String,
    /// Every tensor of the source, in its order, with what becomes of it.
    pub sources: Vec<(String, SourceTensorUse)>,
    /// A tensor of an expert that joins no other, and the source's tensor that it is a copy of
    /// unless recovery or compression changes it; none where experts share a tensor or are
    /// quantised.
    pub alone: Vec<(String, String)>,
    /// The files that travel from the source as they are, by their paths below it.
    pub companions: Vec<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters of all tensors.
    pub parameters: u64,
    /// Bytes of the routed experts.
    pub expert_bytes: u64,
}

/// A tensor of an [`FolderListing`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedTensor {
    /// Its name.
    pub name: String,
    /// Its data type, by its safetensors name.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its size.
    pub bytes: u64,
    /// The position of its file in [`FolderListing::files`].
    pub file: usize,
    /// The source's tensor whose bytes it has; `None` where something is computed.
    pub copies: Option<String>,
}

/// What becomes of a tensor of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceTensorUse {
    /// Copied, bit for bit.
    Copied,
    /// Written in a data type that is not quantised.
    Dequantised,
    /// Part of a merged layer's router.
    Router(LayerId),
    /// Part of an expert that has a group of its own.
    Alone(LayerId, usize),
    /// Part of an expert that is merged into a group: layer, expert, group.
    Merged(LayerId, usize, usize),
    /// Part of an expert in no group.
    Pruned(LayerId, usize),
    /// Holds all experts of a layer, which are merged.
    Shared(LayerId),
    /// Left out, and why.
    Dropped(String),
}

impl Checkpoint {
    /// The folder that a plan asks for; reads headers only.
    ///
    /// # Errors
    /// Those of [`Writer::create`](crate::checkpoint::Writer::create), but for the target.
    pub fn outline(&self, plan: &WritePlan) -> Result<FolderListing> {
        let laid = Plan::new(self, plan)?;
        let config = target_config::config(self, plan, laid.experts)?;
        let name = |t: usize| self.store.entry(t).name.clone();
        let exact = |t: &usize| self.store.quantised().scheme(*t).is_none();
        let tensor = |out: &super::layout_plan::Out| ListedTensor {
            name: out.name.clone(),
            dtype: out.dtype.name(),
            shape: out.shape.clone(),
            bytes: out.bytes as u64,
            file: out.file,
            copies: out.copies.filter(exact).map(name),
        };
        Ok(FolderListing {
            tensors: laid.outs.iter().map(tensor).collect(),
            files: laid.files.iter().map(|f| (f.name.clone(), f.size)).collect(),
            config,
            sources: self.source_uses(plan, &laid),
            alone: self.alone(plan),
            companions: companion_files(self.dir())?,
            bytes: laid.bytes(),
            parameters: laid.parameters(),
            expert_bytes: laid.expert_bytes(self),
        })
    }

    fn source_uses(&self, plan: &WritePlan, laid: &Plan) -> Vec<(String, SourceTensorUse)> {
        let mut known: HashMap<usize, SourceTensorUse> = HashMap::new();
        for layer in &self.tensors {
            if let Some(grouping) = plan.groupings.get(&layer.id) {
                experts(layer, grouping, &mut known);
            }
        }
        let dropped: HashMap<&str, &str> =
            laid.dropped.iter().map(|(name, why)| (&**name, &**why)).collect();
        let fate = |(tensor, found): (usize, &crate::checkpoint::read::Tensor)| {
            let name = &found.entry.name;
            let fate = match (dropped.get(&**name), known.remove(&tensor)) {
                (Some(why), _) => SourceTensorUse::Dropped((*why).to_owned()),
                (None, Some(fate)) => fate,
                (None, None) if self.store.quantised().scheme(tensor).is_some() => {
                    SourceTensorUse::Dequantised
                }
                (None, None) => SourceTensorUse::Copied,
            };
            (name.clone(), fate)
        };
        self.store.tensors().iter().enumerate().map(fate).collect()
    }

    fn alone(&self, plan: &WritePlan) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        for layer in &self.tensors {
            let Some(grouping) = plan.groupings.get(&layer.id) else { continue };
            if plan.factored.contains_key(&layer.id) {
                continue;
            }
            let types = dequantise::merged_types(&self.store, layer);
            for (g, &from) in grouping.dominants().iter().enumerate() {
                if grouping.members(g).len() != 1 {
                    continue;
                }
                let to = if plan.export == Export::Expanded { from } else { g };
                let projections = layer.experts[to].iter().zip(&layer.experts[from]);
                for (at, (named, copied)) in projections.enumerate() {
                    let tensor = copied.weight.tensor;
                    let keeps_type = grouping.groups() == grouping.experts()
                        || types[at][0] == self.store.entry(tensor).dtype;
                    let plain = self.store.quantised().scheme(tensor).is_none() && keeps_type;
                    if plain && self.own_tensors(named) && self.own_tensors(copied) {
                        let name = dequantise::plain(&self.store, named.weight.tensor).name;
                        pairs.push((name.to_owned(), self.store.entry(tensor).name.clone()));
                    }
                }
            }
        }
        pairs
    }

    /// Checks that every value of a tensor is a finite number; tensors of integers pass.
    ///
    /// # Errors
    /// [`NotFinite`](crate::ErrorKind::NotFinite) and
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for an unknown name, with file and tensor.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        /// Bytes that are decoded at a time.
        const BLOCK: usize = 1 << 22;
        let found = self.store.get(name);
        let tensor = found.ok_or_else(|| Error::range("tensor", "a tensor of the model", name))?;
        let dtype = self.store.entry(tensor).dtype;
        if !dtype.is_float() || self.store.quantised().scheme(tensor).is_some() {
            return Ok(());
        }
        for (i, block) in self.store.bytes(tensor).chunks(BLOCK).enumerate() {
            let decoded = self.store.unchanged(tensor, || dtype.decode(block));
            let check =
                decoded.and_then(|values| ArrayView1::from(&values[..]).check_finite("tensor"));
            check.in_tensor(name).in_file(self.store.path(tensor))?;
            self.store.release(tensor, i * BLOCK..i * BLOCK + block.len());
        }
        Ok(())
    }
}

/// The source_uses of a merged layer's tensors.
fn experts(layer: &LayerTensors, grouping: &Grouping, known: &mut HashMap<usize, SourceTensorUse>) {
    let id = layer.id;
    for tensor in layer.routing() {
        known.insert(tensor, SourceTensorUse::Router(id));
    }
    let mut owner: HashMap<usize, usize> = HashMap::new();
    let sizes: Vec<usize> = (0..grouping.groups()).map(|g| grouping.members(g).len()).collect();
    for (e, expert) in layer.experts.iter().enumerate() {
        for tensor in expert.iter().flat_map(|projection| projection.tensors()) {
            let fate = match grouping.labels()[e] {
                _ if *owner.entry(tensor).or_insert(e) != e => SourceTensorUse::Shared(id),
                None => SourceTensorUse::Pruned(id, e),
                Some(g) if sizes[g] == 1 => SourceTensorUse::Alone(id, e),
                Some(g) => SourceTensorUse::Merged(id, e, g),
            };
            known.insert(tensor, fate);
        }
    }
}
