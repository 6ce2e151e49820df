//! Some layers of a target, written by themselves: a folder of safetensors files that another
//! process joins with the rest.

use std::path::{Path, PathBuf};

use super::file::CHUNK;
use super::layer::Begun;
use super::writer::Writer;
use crate::checkpoint::read::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::LayerId;

/// A folder that was written with [`WritePlan::only`](crate::checkpoint::WritePlan::only).
#[derive(Debug)]
pub struct Part {
    dir: PathBuf,
    store: Store,
}

impl Part {
    /// Opens the files of a part.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`](crate::checkpoint::Checkpoint::open) that concern files.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), store: Store::open(dir)? })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Writer<'_> {
    /// Writes a layer that lies in a part, and checks that it is the one whose
    /// [digest](Writer::digest) was told.
    ///
    /// # Errors
    /// As [`Writer::layer`]; [`Format`](ErrorKind::Format) when the part lacks a tensor of the
    /// layer, has it in another type or shape, or when the digest is another.
    pub fn take(&mut self, id: LayerId, part: &Part, digest: &str) -> Result<()> {
        self.copy_part(id, part).in_layer(id).in_file(part.dir())?;
        if self.digest_on_disk(id)? != digest {
            let reason = "its tensors are not those that its manifest tells".to_owned();
            let kind = ErrorKind::Format { format: "part", reason };
            return Err(kind.into()).in_layer(id).in_file(part.dir());
        }
        self.finished(id)
    }

    fn copy_part(&mut self, id: LayerId, part: &Part) -> Result<()> {
        let planned = self.plan.layers.get(&id).filter(|_| !self.begun.contains_key(&id));
        let Some(layer) = planned else {
            return Err(Error::range("layer", "a planned layer that is not yet written", id));
        };
        let tensors: Vec<usize> = layer.routing().chain(layer.expert_tensors()).collect();
        self.begun.insert(id, Begun::default());
        for tensor in tensors {
            let out = &self.plan.outs[tensor];
            let name = out.name.clone();
            let found = part.store.get(&name).filter(|&t| {
                let entry = part.store.entry(t);
                entry.dtype == out.dtype && entry.shape == out.shape
            });
            let Some(found) = found else {
                let reason = format!("no {} of shape {:?}", out.dtype.name(), out.shape);
                return Err(ErrorKind::Format { format: "part", reason }.into()).in_tensor(&name);
            };
            let bytes = part.store.bytes(found);
            if bytes.is_empty() {
                self.put_bytes(tensor, 0, bytes)?;
            }
            for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
                part.store.unchanged(found, || self.put_bytes(tensor, i * CHUNK, chunk))?;
            }
            part.store.release(found, 0..bytes.len());
        }
        Ok(())
    }
}
