//! Writing a merged checkpoint, layer by layer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::file::{CHUNK, Flush, Output, write_whole};
use super::layer::Begun;
use super::layout_plan::Plan;
use super::request::WritePlan;
use super::target::Partial;
use super::target_config;
use crate::checkpoint::read::Checkpoint;
use crate::error::Result;
use crate::model::{Grouping, LayerId};

/// Writes a folder beside the target's place and gives it the target's name at the very end.
/// Dropped before [`Writer::finish`], it leaves nothing behind.
pub struct Writer<'a> {
    pub(super) source: &'a Checkpoint,
    pub(super) request: WritePlan,
    pub(super) plan: Arc<Plan>,
    pub(super) groupings: Arc<BTreeMap<LayerId, Grouping>>,
    pub(super) target: Partial,
    pub(super) open: HashMap<usize, Output>,
    pub(super) digests: BTreeMap<String, (u64, String)>,
    /// Whole files that are not known to be on the disk.
    pub(super) flushing: Vec<Flush>,
    /// The first tensor that is not yet in its file.
    next: usize,
    /// Layers of which something was written; after a failure more than are done.
    pub(super) begun: BTreeMap<LayerId, Begun>,
    pub(super) done: BTreeSet<LayerId>,
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
        Self::planned(source, plan, || Partial::create(source.dir(), target))
    }

    /// [`Writer::create`] in a folder that is there already: one that was just made, or what an
    /// interrupted run left. Its files are written over, except for the layers that are then
    /// [adopted](Writer::adopt).
    ///
    /// # Errors
    /// As [`Writer::create`], but for the target.
    pub fn within(source: &'a Checkpoint, target: Partial, plan: &WritePlan) -> Result<Self> {
        Self::planned(source, plan, || Ok(target))
    }

    fn planned(
        source: &'a Checkpoint,
        request: &WritePlan,
        target: impl FnOnce() -> Result<Partial>,
    ) -> Result<Self> {
        let request = request.clone();
        let plan = Plan::new(source, &request)?;
        // Written at the end, when all groups are known; what it refuses is told now.
        target_config::config(source, &request, plan.experts)?;
        let target = target()?;
        let mut owner = HashMap::new();
        for (id, layer) in &plan.layers {
            let tensors = layer.routing().chain(layer.expert_tensors());
            owner.extend(tensors.map(|tensor| (tensor, *id)));
        }
        let (open, digests, flushing) = (HashMap::new(), BTreeMap::new(), Vec::new());
        let (begun, done) = (BTreeMap::new(), BTreeSet::new());
        let groupings = Arc::new(request.groupings.clone());
        let mut writer = Self {
            source,
            request,
            plan: Arc::new(plan),
            groupings,
            target,
            open,
            digests,
            flushing,
            next: 0,
            begun,
            done,
            owner,
        };
        writer.advance()?;
        Ok(writer)
    }

    pub(super) fn finished(&mut self, id: LayerId) -> Result<()> {
        self.done.insert(id);
        self.advance()
    }

    /// Copies tensors up to the next layer that is still to come.
    pub(super) fn advance(&mut self) -> Result<()> {
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
            source.store.unchanged(original, || self.put_bytes(tensor, start, chunk))?;
            source.store.release(original, start..start + chunk.len());
        }
        Ok(())
    }

    /// The folder that is being written.
    pub fn folder(&self) -> &Path {
        self.target.path()
    }

    pub(super) fn file_name(&self, tensor: usize) -> String {
        self.plan.files[self.plan.outs[tensor].file].name.clone()
    }

    pub(super) fn small(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let digest = write_whole(&self.target.path().join(name), bytes)?;
        self.digests.insert(name.to_owned(), (bytes.len() as u64, digest));
        Ok(())
    }
}
