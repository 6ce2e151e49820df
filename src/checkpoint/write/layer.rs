//! A merged layer's tensors, put in their places whole or expert by expert.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::check::{check_dropped, target_rule};
use super::encode::{Encoded, Encoder, Part, Sum, places};
use super::file::{Output, hash_part};
use super::request::Export;
use super::writer::Writer;
use crate::digest::hexadecimal;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Grouping, LayerId, MergedLayer, Router};
use crate::par;

/// Whole files that are on their way to the disk at a time: each is open and has a thread.
const FLUSHING: usize = 16;

/// What is known of a layer while it is written.
#[derive(Default)]
pub(super) struct Begun {
    routing: Vec<Sum>,
    /// Sums of each slot's parts; empty until it is there.
    slots: Vec<Vec<Sum>>,
}

impl Writer<'_> {
    /// Converts experts for [`Writer::expert`], on any thread.
    pub fn encoder(&self) -> Encoder {
        Encoder {
            plan: Arc::clone(&self.plan),
            groupings: Arc::clone(&self.groupings),
            export: self.request.export,
        }
    }

    /// Writes a merged layer. Layers may come in any order, each planned one exactly once; in the
    /// order of [`Checkpoint::layers`](crate::checkpoint::Checkpoint::layers) every file is written
    /// front to back.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned or was written
    /// before, or a weight that its data type cannot hold, after which the run cannot be finished;
    /// [`Shape`](crate::ErrorKind::Shape) when grouping, experts or routers are not those planned;
    /// [`Missing`](crate::ErrorKind::Missing) without a narrowed router for a stock export;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn layer(&mut self, merged: &MergedLayer) -> Result<()> {
        /// Experts that are converted at a time.
        const WAVE: usize = 8;
        let MergedLayer { id, experts, grouping, router, narrowed, factors } = merged;
        self.begin(*id, grouping, router, narrowed.as_ref())?;
        let encoder = self.encoder();
        for start in (0..experts.len()).step_by(WAVE) {
            let encode = |i: usize| {
                let factors = factors.as_ref().and_then(|all| all.get(start + i));
                let factors = factors.map(Vec::as_slice);
                encoder.expert_in(*id, start + i, &experts[start + i], factors)
            };
            let encoded = par::map(WAVE.min(experts.len() - start), encode).in_layer(*id)?;
            encoded.into_iter().try_for_each(|encoded| self.expert(encoded))?;
        }
        self.end(*id)
    }

    /// Plans other groups for a layer that is not yet written: as many of them, which is all that
    /// decides where tensors lie. So a layer can be decided after the first one was written.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned or was begun,
    /// [`Shape`](crate::ErrorKind::Shape) for another number of experts or groups,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for dropped experts in an expanded export.
    pub fn regroup(&mut self, id: LayerId, grouping: &Grouping) -> Result<()> {
        let mut regroup = || {
            let planned =
                self.request.groupings.get_mut(&id).filter(|_| !self.begun.contains_key(&id));
            let Some(planned) = planned else {
                return Err(Error::range("layer", "a planned layer that is not yet written", id));
            };
            let size = |g: &Grouping| (g.experts(), g.groups());
            if size(planned) != size(grouping) {
                return Err(Error::shape("grouping", size(planned), size(grouping)));
            }
            check_dropped(self.request.export, grouping)?;
            *planned = grouping.clone();
            Arc::make_mut(&mut self.groupings).insert(id, grouping.clone());
            Ok(())
        };
        regroup().in_layer(id)
    }

    /// Begins a layer: writes its router. [`Writer::expert`] for every group and [`Writer::end`]
    /// follow.
    ///
    /// # Errors
    /// As [`Writer::layer`].
    pub fn begin(
        &mut self,
        id: LayerId,
        grouping: &Grouping,
        router: &Router,
        narrowed: Option<&Router>,
    ) -> Result<()> {
        let mut begin = || {
            let planned = self.request.groupings.get(&id).filter(|_| !self.begun.contains_key(&id));
            let Some(planned) = planned else {
                return Err(Error::range("layer", "a planned layer that is not yet written", id));
            };
            if planned != grouping {
                return Err(Error::shape("grouping", planned, grouping));
            }
            let router = self.router_of(id, router, narrowed)?;
            let plan = Arc::clone(&self.plan);
            let Some(out) = plan.layers.get(&id) else {
                return Err(Error::range("layer", "a planned layer", id));
            };
            let parts = self.encoder().router(out, router)?;
            let routing = parts.iter().map(|part| part.sum).collect();
            self.begun.insert(id, Begun { routing, slots: vec![Vec::new(); out.experts.len()] });
            parts.iter().try_for_each(|part| self.put(part))
        };
        begin().in_layer(id)
    }

    /// Writes a converted expert of a layer that was begun.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when its layer was not begun or it is there
    /// already; [`Io`](crate::ErrorKind::Io).
    pub fn expert(&mut self, encoded: Encoded) -> Result<()> {
        let Encoded { layer, slots } = encoded;
        for (slot, parts) in slots {
            let begun = self.begun.get_mut(&layer).and_then(|begun| begun.slots.get_mut(slot));
            let Some(sums) = begun.filter(|sums| sums.is_empty()) else {
                return Err(Error::range("expert", "one that is not yet written", slot))
                    .in_layer(layer);
            };
            sums.extend(parts.iter().map(|part| part.sum));
            let mut put = || parts.iter().try_for_each(|part| self.put(part));
            put().in_expert(slot).in_layer(layer)?;
        }
        Ok(())
    }

    /// Ends a layer.
    ///
    /// # Errors
    /// [`Shape`](crate::ErrorKind::Shape) when an expert is missing; [`Io`](crate::ErrorKind::Io).
    pub fn end(&mut self, id: LayerId) -> Result<()> {
        let slots = self.begun.get(&id).map_or(&[][..], |begun| &begun.slots);
        let written = slots.iter().filter(|sums| !sums.is_empty()).count();
        if written != slots.len() || slots.is_empty() {
            return Err(Error::shape("experts written", slots.len(), written)).in_layer(id);
        }
        self.source.release(id);
        self.finished(id)
    }

    /// The router to write, as planned.
    fn router_of<'m>(
        &self,
        id: LayerId,
        router: &'m Router,
        narrowed: Option<&'m Router>,
    ) -> Result<&'m Router> {
        if self.request.export != Export::Stock {
            return Ok(router);
        }
        let Some(router) = narrowed else {
            let (stage, needs) = ("the stock export".into(), "a narrowed router".into());
            let remedy = "narrow it, or choose another export".into();
            return Err(ErrorKind::Missing { stage, needs, remedy }.into());
        };
        let expected = target_rule(self.source.layer(id)?.rule, &self.request);
        if *router.rule() != expected {
            return Err(Error::shape("narrowed router's policy", expected, router.rule()));
        }
        Ok(router)
    }

    fn put(&mut self, part: &Part) -> Result<()> {
        self.put_bytes(part.tensor, part.start, &part.bytes)
    }

    /// Writes bytes to a tensor's place in its file, which is created at its first byte and closed
    /// at its last.
    pub(super) fn put_bytes(&mut self, tensor: usize, start: usize, bytes: &[u8]) -> Result<()> {
        let at = self.plan.outs[tensor].at + start as u64;
        self.fill(tensor, |output| match bytes.is_empty() {
            true => Ok(()),
            false => output.write(at, bytes),
        })
    }

    /// Lets `part` add a part to the file of a tensor.
    fn fill(&mut self, tensor: usize, part: impl FnOnce(&mut Output) -> Result<()>) -> Result<()> {
        let out = &self.plan.outs[tensor];
        let file = &self.plan.files[out.file];
        let output = match self.open.entry(out.file) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(new) => {
                let mut output = Output::create(&self.target.path().join(&file.name), file.size)?;
                output.write(0, &file.header)?;
                new.insert(output)
            }
        };
        part(output)?;
        if output.is_complete()
            && let Some(output) = self.open.remove(&out.file)
        {
            let (digest, flush) = output.close();
            self.flushing.push(flush);
            if self.flushing.len() > FLUSHING {
                self.flushing.remove(0).wait()?;
            }
            self.digests.insert(file.name.clone(), (file.size, digest));
        }
        Ok(())
    }
}

impl Writer<'_> {
    /// A checksum of a layer, SHA-256 over the XXH3 of each of its parts, router first, in
    /// hexadecimal digits: of the bytes that were written, or, for a layer of an interrupted run,
    /// that lie on the disk. It finds torn writes; it is no proof against forgery.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned,
    /// [`Io`](crate::ErrorKind::Io) when a part of it is not there.
    pub fn digest(&self, id: LayerId) -> Result<String> {
        let Some(begun) = self.begun.get(&id) else { return self.digest_on_disk(id) };
        Ok(digest(begun.routing.iter().chain(begun.slots.iter().flatten())))
    }

    /// [`Writer::digest`] of what lies on the disk.
    pub(super) fn digest_on_disk(&self, id: LayerId) -> Result<String> {
        Ok(digest(&self.sums(id).in_layer(id)?))
    }

    /// The sums of a layer's parts as they lie on the disk.
    fn sums(&self, id: LayerId) -> Result<Vec<Sum>> {
        let Some(layer) = self.plan.layers.get(&id) else {
            return Err(Error::range("layer", "a planned layer", id));
        };
        let whole = |tensor: usize| (tensor, 0, self.plan.outs[tensor].bytes);
        let experts = layer.experts.iter().flat_map(|slot| places(&self.plan, slot));
        let places: Vec<_> = layer.routing().map(whole).chain(experts).collect();
        par::map(places.len(), |i| {
            let (tensor, start, length) = places[i];
            let out = &self.plan.outs[tensor];
            let path = self.target.path().join(&self.plan.files[out.file].name);
            hash_part(&path, out.at + start as u64, length as u64)
        })
    }

    /// Takes a layer that an interrupted run has written, if its bytes are those that
    /// [`Writer::digest`] told then; whether it did.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned or was written
    /// before; [`Io`](crate::ErrorKind::Io).
    pub fn adopt(&mut self, id: LayerId, digest: &str) -> Result<bool> {
        if self.begun.contains_key(&id) {
            return Err(Error::range("layer", "a layer that is not yet written", id)).in_layer(id);
        }
        let Some(layer) = self.plan.layers.get(&id) else {
            return Err(Error::range("layer", "a planned layer", id)).in_layer(id);
        };
        let tensors: Vec<usize> = layer.routing().chain(layer.expert_tensors()).collect();
        // A part that cannot be read is a layer that has to be written again.
        if self.digest(id).ok().as_deref() != Some(digest) {
            return Ok(false);
        }
        self.begun.insert(id, Begun::default());
        for tensor in tensors {
            let (at, length) = (self.plan.outs[tensor].at, self.plan.outs[tensor].bytes as u64);
            self.fill(tensor, |output| output.adopt(at, length)).in_layer(id)?;
        }
        self.finished(id)?;
        Ok(true)
    }

    /// Makes everything that was written outlast a power cut.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io).
    pub fn sync(&mut self) -> Result<()> {
        self.open.values_mut().try_for_each(Output::sync)
    }
}

fn digest<'a>(sums: impl IntoIterator<Item = &'a Sum>) -> String {
    let mut all = Sha256::new();
    sums.into_iter().for_each(|sum| all.update(sum));
    hexadecimal(all)
}
