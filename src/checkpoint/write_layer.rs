//! A merged layer's tensors, converted and put in their places.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use ndarray::Array1;
use sha2::{Digest, Sha256};

use super::scan_layer::{Order, Piece, Projection};
use super::write::{Export, Writer};
use super::write_check::target_rule;
use super::write_file::{Output, hash_part, hexadecimal};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Expert, Grouping, LayerId, MergedLayer, Router};

impl Writer<'_> {
    /// Writes the tensors of a merged layer to their places.
    pub(super) fn write_layer(&mut self, merged: &MergedLayer) -> Result<()> {
        let id = merged.id;
        let planned = self.request.groupings.get(&id).filter(|_| !self.begun.contains(&id));
        let Some(grouping) = planned.cloned() else {
            return Err(Error::range("layer", "a planned layer that is not yet written", id));
        };
        if grouping != merged.grouping {
            return Err(Error::shape("grouping", grouping, &merged.grouping));
        }
        let router = self.router_of(merged)?;
        let Some(out) = self.plan.layers.get(&id).cloned() else {
            return Err(Error::range("layer", "a planned layer", id));
        };
        self.begun.insert(id);
        let rows = router.weight();
        let weight = rows.as_standard_layout();
        self.put(whole(out.router, weight.len()), weight.as_slice().unwrap_or_default())?;
        let biases = [(out.router_bias, router.bias()), (out.correction, router.correction())];
        for (tensor, values) in biases {
            self.put_vector(tensor.map(|t| whole(t, rows.nrows())), values)?;
        }
        for (slot, projections) in out.experts.iter().enumerate() {
            let group = match self.request.export {
                Export::Stock | Export::Native => slot,
                Export::Expanded => grouping.labels()[slot].unwrap_or(slot),
            };
            let expert = &merged.experts[group];
            let untouched = self.untouched(id, &grouping, group, expert)?;
            match &untouched {
                Some((original, _)) if !self.is_quantised(id)? => {
                    self.put_original(id, projections, *original)
                }
                Some((_, expert)) => self.put_expert(projections, expert),
                None => self.put_expert(projections, expert),
            }
            .in_expert(slot)?;
        }
        Ok(())
    }

    /// Whether experts of a layer of the source are quantised.
    fn is_quantised(&self, id: LayerId) -> Result<bool> {
        let layer = &self.source.tensors[self.source.position(id)?];
        let quantised = self.source.store.quantised();
        Ok(layer.expert_tensors().iter().any(|&t| quantised.scheme(t).is_some()))
    }

    /// The router to write, as planned.
    fn router_of<'m>(&self, merged: &'m MergedLayer) -> Result<&'m Router> {
        if self.request.export != Export::Stock {
            return Ok(&merged.router);
        }
        let Some(router) = &merged.narrowed else {
            let (stage, needs) = ("the stock export".into(), "a narrowed router".into());
            let remedy = "narrow it, or choose another export".into();
            return Err(ErrorKind::Missing { stage, needs, remedy }.into());
        };
        let expected = target_rule(self.source.layer(merged.id)?.rule, &self.request);
        if *router.rule() != expected {
            return Err(Error::shape("narrowed router's policy", expected, router.rule()));
        }
        Ok(router)
    }

    /// The source's expert when `group` is that expert alone and has its values: it is what is
    /// written then, so that the sign of zeros survives too.
    fn untouched(
        &self,
        id: LayerId,
        grouping: &Grouping,
        group: usize,
        expert: &Expert,
    ) -> Result<Option<(usize, Expert)>> {
        let &[original] = &grouping.members(group)[..] else { return Ok(None) };
        let read = self.source.read_expert(id, original)?;
        Ok((read == *expert).then_some((original, read)))
    }

    /// Converts an expert and writes it to its places.
    fn put_expert(&mut self, to: &[Projection], expert: &Expert) -> Result<()> {
        let mut slabs = BTreeMap::new();
        for Projection { role, weight, bias, order } in to.iter().copied() {
            let Some(linear) = expert.view().linear(role) else {
                return Err(Error::shape("expert", format!("a {role} projection"), "none"));
            };
            let expected = (weight.rows, weight.cols);
            if linear.weight.dim() != expected {
                return Err(Error::shape("expert projection", expected, linear.weight.dim()));
            }
            let widths = (bias.map(|b| b.cols), linear.bias.map(|b| b.len()));
            if widths.0 != widths.1 {
                return Err(Error::shape("bias", widths.0, widths.1));
            }
            let values = linear.weight.as_standard_layout();
            let values = values.as_slice().unwrap_or_default();
            self.put_ordered(weight, expected, order, values, &mut slabs)?;
            if let (Some(piece), Some(values)) = (bias, linear.bias) {
                let (shape, order) = ((piece.cols, 1), order.upright());
                self.put_ordered(piece, shape, order, &values.to_vec(), &mut slabs)?;
            }
        }
        let whole = |((tensor, start), values): (_, Vec<f32>)| {
            self.put(Piece { tensor, start, rows: 1, cols: values.len() }, &values)
        };
        slabs.into_iter().try_for_each(whole)
    }

    /// Writes a piece, or puts it into the slab that it shares with others.
    fn put_ordered(
        &mut self,
        piece: Piece,
        shape: (usize, usize),
        order: Order,
        values: &[f32],
        slabs: &mut BTreeMap<(usize, usize), Vec<f32>>,
    ) -> Result<()> {
        if order == Order::PLAIN {
            return self.put(piece, values);
        }
        let slab = slabs.entry((piece.tensor, piece.start));
        let slab = slab.or_insert_with(|| vec![0.0; order.slab(piece).cols]);
        order.walk(shape, |from, to| slab[to] = values[from]);
        Ok(())
    }

    fn put_vector(&mut self, piece: Option<Piece>, values: Option<&Array1<f32>>) -> Result<()> {
        match (piece, values) {
            (None, None) => Ok(()),
            (Some(piece), Some(values)) if values.len() == piece.cols => {
                self.put(piece, &values.to_vec())
            }
            (piece, values) => {
                let (expected, found) = (piece.map(|p| p.cols), values.map(|v| v.len()));
                Err(Error::shape("bias", expected, found))
            }
        }
    }

    /// Converts values and writes them to their place.
    fn put(&mut self, piece: Piece, values: &[f32]) -> Result<()> {
        let out = &self.plan.outs[piece.tensor];
        let (dtype, expected) = (out.dtype, piece.rows * piece.cols);
        let convert = || {
            if values.len() != expected {
                return Err(Error::shape("tensor to write", expected, values.len()));
            }
            let mut bytes = Vec::with_capacity(expected * dtype.alignment());
            dtype.encode(values, &mut bytes)?;
            Ok(bytes)
        };
        let bytes = convert().in_tensor(&out.name)?;
        self.put_bytes(piece.tensor, piece.start, &bytes)
    }

    /// Copies the bytes of expert `original` of the source.
    fn put_original(&mut self, id: LayerId, to: &[Projection], original: usize) -> Result<()> {
        let source = self.source;
        let from = &source.tensors[source.position(id)?].experts[original];
        let mut copied = BTreeSet::new();
        for (to, from) in to.iter().zip(from) {
            let pairs = [Some((to.weight, from.weight)), to.bias.zip(from.bias)];
            for (to, part) in pairs.into_iter().flatten() {
                if !copied.insert((to.tensor, to.start)) {
                    continue;
                }
                let size = source.store.entry(part.tensor).dtype.alignment();
                let length = from.order.slab(part).cols * size;
                let bytes = &source.store.bytes(part.tensor)[part.start..part.start + length];
                self.put_bytes(to.tensor, to.start, bytes)?;
            }
        }
        Ok(())
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
            self.digests.insert(file.name.clone(), (file.size, digest));
        }
        Ok(())
    }
}

impl Writer<'_> {
    /// SHA-256 of a layer's tensors as they lie on the disk, in hexadecimal digits.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned,
    /// [`Io`](crate::ErrorKind::Io) when a part of it is not there.
    pub fn digest(&self, id: LayerId) -> Result<String> {
        let mut hash = Sha256::new();
        for tensor in self.tensors_of(id).in_layer(id)? {
            let out = &self.plan.outs[tensor];
            let path = self.target.path().join(&self.plan.files[out.file].name);
            hash_part(&path, out.at, out.bytes as u64, &mut hash).in_layer(id)?;
        }
        Ok(hexadecimal(hash))
    }

    /// Takes a layer that an interrupted run has written, if its bytes are those that
    /// [`Writer::digest`] told then; whether it did.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned or was written
    /// before; [`Io`](crate::ErrorKind::Io).
    pub fn adopt(&mut self, id: LayerId, sha256: &str) -> Result<bool> {
        if self.begun.contains(&id) {
            return Err(Error::range("layer", "a layer that is not yet written", id)).in_layer(id);
        }
        let tensors = self.tensors_of(id).in_layer(id)?;
        // A part that cannot be read is a layer that has to be written again.
        if self.digest(id).ok().as_deref() != Some(sha256) {
            return Ok(false);
        }
        self.begun.insert(id);
        for tensor in tensors {
            let (at, length) = (self.plan.outs[tensor].at, self.plan.outs[tensor].bytes as u64);
            self.fill(tensor, |output| output.adopt(at, length)).in_layer(id)?;
        }
        self.finished(id)?;
        Ok(true)
    }

    fn tensors_of(&self, id: LayerId) -> Result<Vec<usize>> {
        let Some(layer) = self.plan.layers.get(&id) else {
            return Err(Error::range("layer", "a planned layer", id));
        };
        Ok(layer.routing().chain(layer.expert_tensors()).collect())
    }

    /// Makes everything that was written outlast a power cut.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io).
    pub fn sync(&self) -> Result<()> {
        self.open.values().try_for_each(Output::sync)
    }
}

/// A whole tensor of `len` values.
fn whole(tensor: usize, len: usize) -> Piece {
    Piece { tensor, start: 0, rows: 1, cols: len }
}
