//! Writing a merged checkpoint, layer by layer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Value, json};

use super::folder::INDEX;
use super::open::Checkpoint;
use super::scan_layer::LayerTensors;
use super::write_config;
use super::write_file::{CHUNK, Flush, Output, copy_whole, write_whole};
use super::write_plan::Plan;
use super::write_target::Partial;
use crate::error::{Error, Locate, Result};
use crate::model::{Grouping, LayerId, MergedLayer};

/// What kind of folder to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Export {
    /// `M` experts in every layer and a router of `M` rows: loads in unmodified runtimes. Needs
    /// the same `M` everywhere and [`MergedLayer::narrowed`].
    Stock,
    /// `M` experts, any number per layer, the `N`-row router and the expert map in `config.json`:
    /// exact, for runtimes that know the map. Others refuse the model type.
    Native,
    /// `N` experts, each a copy of its group's: exact in unmodified runtimes, saves nothing.
    Expanded,
}

/// What to write.
#[derive(Debug, Clone, PartialEq)]
pub struct WritePlan {
    /// The kind of folder.
    pub export: Export,
    /// The merged layers; MoE layers that are not named here are copied.
    pub groupings: BTreeMap<LayerId, Grouping>,
    /// A lower number of experts per token.
    pub top_k: Option<usize>,
    /// Whether to give up group-limited routing (`n_group = topk_group = 1`).
    pub flatten_groups: bool,
    /// The size above which a new file is begun.
    pub shard_bytes: u64,
}

impl WritePlan {
    /// A plan with the original top-k and routing groups and shards of 5 GB.
    pub fn new(export: Export, groupings: BTreeMap<LayerId, Grouping>) -> Self {
        let (top_k, flatten_groups, shard_bytes) = (None, false, 5_000_000_000);
        Self { export, groupings, top_k, flatten_groups, shard_bytes }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Names of all files, `mcsmoe.json` included.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters of all tensors.
    pub parameters: u64,
    /// Bytes of the experts of all MoE layers, shared ones excluded.
    pub expert_bytes: u64,
    /// Tensors of the source that were left out, each with the reason.
    pub dropped: Vec<(String, String)>,
}

/// Writes a folder beside the target's place and gives it the target's name at the very end.
/// Dropped before [`Writer::finish`], it leaves nothing behind.
pub struct Writer<'a> {
    pub(super) source: &'a Checkpoint,
    pub(super) request: WritePlan,
    pub(super) plan: Plan,
    pub(super) target: Partial,
    pub(super) open: HashMap<usize, Output>,
    pub(super) digests: BTreeMap<String, (u64, String)>,
    /// Whole files that are not known to be on the disk.
    pub(super) flushing: Vec<Flush>,
    /// The first tensor that is not yet in its file.
    next: usize,
    /// Layers of which something was written; after a failure more than are done.
    pub(super) begun: BTreeSet<LayerId>,
    done: BTreeSet<LayerId>,
    /// Planned layer of each of its tensors.
    owner: HashMap<usize, LayerId>,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("target", &self.target).field("done", &self.done).finish()
    }
}

impl<'a> Writer<'a> {
    /// Checks the plan and the target, and begins to copy what is not merged.
    ///
    /// # Errors
    /// [`Target`](crate::ErrorKind::Target) for a target that is the source, lies in it or holds
    /// anything, or a partial folder of another run; [`Budget`](crate::ErrorKind::Budget) when a
    /// stock export has different numbers of experts; [`OutOfRange`](crate::ErrorKind::OutOfRange)
    /// when top-k or routing groups do not fit; [`Unsupported`](crate::ErrorKind::Unsupported) for
    /// a native source, an unknown quantisation method, or dropped experts in an expanded export;
    /// [`NotFinite`](crate::ErrorKind::NotFinite) for a quantised weight that is no number;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn create(source: &'a Checkpoint, target: &Path, plan: &WritePlan) -> Result<Self> {
        let request = plan.clone();
        let plan = Plan::new(source, &request)?;
        let config = write_config::config(source, &request, plan.experts)?;
        let target = Partial::create(source.dir(), target)?;
        let mut owner = HashMap::new();
        for (id, layer) in &plan.layers {
            let tensors = layer.routing().chain(layer.expert_tensors());
            owner.extend(tensors.map(|tensor| (tensor, *id)));
        }
        let (open, digests, flushing) = (HashMap::new(), BTreeMap::new(), Vec::new());
        let (begun, done) = (BTreeSet::new(), BTreeSet::new());
        let mut writer = Self {
            source,
            request,
            plan,
            target,
            open,
            digests,
            flushing,
            next: 0,
            begun,
            done,
            owner,
        };
        writer.small("config.json", config.as_bytes())?;
        writer.advance()?;
        Ok(writer)
    }

    /// Writes a merged layer. Layers may come in any order, each planned one exactly once; in the
    /// order of [`Checkpoint::layers`] every file is written front to back.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned or was written
    /// before, or a weight that its data type cannot hold, after which the run cannot be finished;
    /// [`Shape`](crate::ErrorKind::Shape) when grouping, experts or routers are not those planned;
    /// [`Missing`](crate::ErrorKind::Missing) without a narrowed router for a stock export;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn layer(&mut self, merged: &MergedLayer) -> Result<()> {
        self.write_layer(merged).in_layer(merged.id)?;
        self.source.release(merged.id);
        self.done.insert(merged.id);
        self.advance()
    }

    /// Copies tensors up to the next layer that is still to come.
    fn advance(&mut self) -> Result<()> {
        while let Some(out) = self.plan.outs.get(self.next) {
            match (out.copies, self.owner.get(&self.next)) {
                (Some(original), _) => self.copy(self.next, original)?,
                (None, Some(id)) if !self.done.contains(id) => break,
                (None, _) => {}
            }
            self.next += 1;
        }
        Ok(())
    }

    fn copy(&mut self, tensor: usize, original: usize) -> Result<()> {
        let source = self.source;
        let bytes = source.store.bytes(original);
        let quantised = source.store.quantised().scheme(original).is_some();
        if quantised && !bytes.is_empty() {
            return self.dequantise(tensor, original);
        }
        if bytes.is_empty() && !self.digests.contains_key(&self.file_name(tensor)) {
            return self.put_bytes(tensor, 0, bytes);
        }
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let start = i * CHUNK;
            self.put_bytes(tensor, start, chunk)?;
            source.store.release(original, start..start + chunk.len());
        }
        Ok(())
    }

    fn file_name(&self, tensor: usize) -> String {
        self.plan.files[self.plan.outs[tensor].file].name.clone()
    }

    fn small(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let digest = write_whole(&self.target.path().join(name), bytes)?;
        self.digests.insert(name.to_owned(), (bytes.len() as u64, digest));
        Ok(())
    }

    /// Writes index, tokenizer and manifest, and gives the folder its name. `extra_json`, an
    /// object, becomes `mcsmoe.json`, with the size and SHA-256 of every other file as `files`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when a planned layer was not written;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn finish(mut self, extra_json: &Value) -> Result<Written> {
        if let Some(id) = self.plan.layers.keys().find(|id| !self.done.contains(id)) {
            return Err(Error::range("planned layer", "written before the end", "nothing"))
                .in_layer(id);
        }
        self.advance()?;
        if let Some(file) = self.plan.files.iter().find(|f| !self.digests.contains_key(&f.name)) {
            // Only after a failed write that the caller went on from.
            return Err(Error::range("file of the target", "complete", "a part of it"))
                .in_file(&self.target.path().join(&file.name));
        }
        if self.plan.files.len() > 1 {
            let index = self.index().to_string();
            self.small(INDEX, index.as_bytes())?;
        }
        self.companions()?;
        let files = self.digests.iter().map(|(name, (bytes, sha256))| {
            (name.clone(), json!({ "bytes": bytes, "sha256": sha256 }))
        });
        let files: serde_json::Map<String, Value> = files.collect();
        let mut manifest = match extra_json {
            Value::Object(members) => members.clone(),
            Value::Null => serde_json::Map::new(),
            other => [("report".to_owned(), other.clone())].into_iter().collect(),
        };
        manifest.insert("files".into(), Value::Object(files));
        let text = format!("{:#}\n", Value::Object(manifest));
        self.small("mcsmoe.json", text.as_bytes())?;
        let written = self.written();
        // Only what has reached the disk may get the target's name.
        self.flushing.drain(..).try_for_each(Flush::wait)?;
        self.target.commit()?;
        Ok(written)
    }

    fn index(&self) -> Value {
        let total: u64 = self.plan.outs.iter().map(|o| o.bytes as u64).sum();
        let file = |i: usize| (self.plan.outs[i].name.clone(), self.file_name(i).into());
        let map: serde_json::Map<String, Value> = (0..self.plan.outs.len()).map(file).collect();
        json!({ "metadata": { "total_size": total }, "weight_map": map })
    }

    /// Copies what a tokenizer and a text generator need.
    fn companions(&mut self) -> Result<()> {
        let dir = self.source.dir();
        let list = |e| Error::io("list folder", e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(list).in_file(dir)? {
            let entry = entry.map_err(list).in_file(dir)?;
            // Follows links, which is how hub caches store files.
            let is_file = entry.path().is_file();
            names.extend(entry.file_name().into_string().ok().filter(|n| is_file && goes_along(n)));
        }
        names.sort_unstable();
        for name in names {
            let copied = copy_whole(&dir.join(&name), &self.target.path().join(&name))?;
            self.digests.insert(name, copied);
        }
        Ok(())
    }

    fn written(&self) -> Written {
        let outs = &self.plan.outs;
        let merged: u64 = self
            .plan
            .layers
            .values()
            .map(|layer| layer.expert_tensors().iter().map(|&t| outs[t].bytes as u64).sum::<u64>())
            .sum();
        let others = self.source.tensors.iter().filter(|l| !self.plan.layers.contains_key(&l.id));
        let copied: BTreeSet<usize> = others.flat_map(LayerTensors::expert_tensors).collect();
        let copied = outs.iter().filter(|o| o.copies.is_some_and(|t| copied.contains(&t)));
        let size = |o: &super::write_plan::Out| o.shape.iter().product::<usize>() as u64;
        Written {
            files: self.digests.keys().cloned().collect(),
            bytes: outs.iter().map(|o| o.bytes as u64).sum(),
            parameters: outs.iter().map(size).sum(),
            expert_bytes: merged + copied.map(|o| o.bytes as u64).sum::<u64>(),
            dropped: self.plan.dropped.clone(),
        }
    }
}

/// Whether a file of the source belongs beside the weights. The README describes another model.
fn goes_along(name: &str) -> bool {
    const STARTS: [&str; 9] = [
        "tokenizer",
        "special_tokens",
        "added_tokens",
        "chat_template",
        "generation_config",
        "vocab",
        "merges",
        "preprocessor_config",
        "processor_config",
    ];
    let code = name.ends_with(".py")
        && ["configuration_", "modeling_", "tokenization_"].iter().any(|s| name.starts_with(s));
    let weights = name.ends_with(".safetensors") || name.ends_with(".bin");
    !weights && (code || name.ends_with(".model") || STARTS.iter().any(|s| name.starts_with(s)))
}
