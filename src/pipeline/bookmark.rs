//! Hidden states behind a finished layer, on the disk: a run that follows the compressed model
//! goes on from them after it was killed.
//!
//! A bookmark of layer `l` is of use once `l` and all before it are written, and the layer after it
//! is merged while `l` is still being written. So the last three are kept.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use ndarray::Array2;
use sha2::{Digest, Sha256};

use super::pass::Pass;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{LayerId, TensorSource};

/// Bookmarks that are kept.
const KEPT: usize = 3;
/// Bytes of the SHA-256 that ends the file.
const HASH: usize = 32;

/// Text on its way, whose place can be marked.
pub(super) trait Marked {
    /// Leaves out all layers up to `id`.
    fn jump_behind(&mut self, id: LayerId) -> Result<()>;
    /// Hands all hidden states to `f`, in the same order every time.
    fn batches(&mut self, f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>) -> Result<()>;
}

impl<S: TensorSource> Marked for Pass<'_, S> {
    fn jump_behind(&mut self, id: LayerId) -> Result<()> {
        Pass::jump_behind(self, id)
    }

    fn batches(&mut self, f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>) -> Result<()> {
        Pass::batches(self, f)
    }
}

/// The bookmarks of a run, in its partial folder.
#[derive(Debug)]
pub(super) struct Bookmarks<'a> {
    folder: &'a Path,
    kept: Vec<LayerId>,
}

impl<'a> Bookmarks<'a> {
    pub(super) fn new(folder: &'a Path) -> Self {
        Self { folder, kept: Vec::new() }
    }

    /// The last of `layers` behind which the states lie whole.
    pub(super) fn last_of(folder: &Path, layers: &[LayerId]) -> Option<LayerId> {
        let whole = |id: &&LayerId| is_whole(&path(folder, **id)).unwrap_or(false);
        layers.iter().rev().find(whole).copied()
    }

    /// Writes the states of `pass` as those behind layer `id`.
    pub(super) fn set(&mut self, pass: &mut dyn Marked, id: LayerId) -> Result<()> {
        let path = path(self.folder, id);
        let draft = path.with_extension("draft");
        let io = |e| Error::io("write hidden states", e);
        let file = File::create(&draft).map_err(io).in_file(&draft)?;
        let mut out = BufWriter::new(&file);
        let mut hash = Sha256::new();
        pass.batches(&mut |states| {
            let rows = states.as_standard_layout();
            let bytes: &[u8] = bytemuck::cast_slice(rows.as_slice().unwrap_or_default());
            hash.update(bytes);
            out.write_all(bytes).map_err(io).in_file(&draft)
        })?;
        out.write_all(&hash.finalize()).and_then(|()| out.flush()).map_err(io).in_file(&draft)?;
        drop(out);
        file.sync_all().map_err(io).in_file(&draft)?;
        fs::rename(&draft, &path).map_err(io).in_file(&path)?;
        self.kept.push(id);
        if self.kept.len() > KEPT {
            let old = self::path(self.folder, self.kept.remove(0));
            fs::remove_file(&old)
                .map_err(|e| Error::io("remove hidden states", e))
                .in_file(&old)?;
        }
        Ok(())
    }

    /// Puts `pass` behind layer `id`.
    pub(super) fn open(&mut self, pass: &mut dyn Marked, id: LayerId) -> Result<()> {
        let path = path(self.folder, id);
        let io = |e| Error::io("read hidden states", e);
        let mut file = BufReader::new(File::open(&path).map_err(io).in_file(&path)?);
        pass.jump_behind(id)?;
        pass.batches(&mut |states| {
            let Some(values) = states.as_slice_mut() else {
                return Err(Error::shape("hidden states", "rows", "another order")).in_file(&path);
            };
            file.read_exact(bytemuck::cast_slice_mut(values)).map_err(io).in_file(&path)
        })?;
        let mut rest = Vec::new();
        file.read_to_end(&mut rest).map_err(io).in_file(&path)?;
        if rest.len() != HASH {
            let reason = format!("expected {HASH} bytes behind the states, found {}", rest.len());
            let kind = ErrorKind::Format { format: "hidden states", reason };
            return Err(kind.into()).in_file(&path);
        }
        self.kept.push(id);
        Ok(())
    }
}

fn path(folder: &Path, id: LayerId) -> PathBuf {
    folder.join(format!(".mcsmoe.{id}.states"))
}

/// Whether a file ends with the SHA-256 of what is before.
fn is_whole(path: &Path) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let Some(mut left) = file.metadata()?.len().checked_sub(HASH as u64) else { return Ok(false) };
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    while left > 0 {
        let part = left.min(buffer.len() as u64) as usize;
        file.read_exact(&mut buffer[..part])?;
        hash.update(&buffer[..part]);
        left -= part as u64;
    }
    let mut found = [0; HASH];
    file.read_exact(&mut found)?;
    Ok(hash.finalize()[..] == found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_or_changed_file_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (LayerId::causal(3), LayerId::causal(4));
        let mut bytes = vec![7; 100];
        bytes.extend_from_slice(&Sha256::digest(&bytes));
        fs::write(path(dir.path(), first), &bytes).unwrap();
        let last = |bytes: &[u8]| {
            fs::write(path(dir.path(), second), bytes).unwrap();
            Bookmarks::last_of(dir.path(), &[first, second])
        };
        assert_eq!(last(&bytes), Some(second));
        assert_eq!(last(&bytes[..131]), Some(first));
        assert_eq!(last(&bytes[..10]), Some(first));
        bytes[50] ^= 1;
        assert_eq!(last(&bytes), Some(first));
        assert_eq!(Bookmarks::last_of(dir.path(), &[]), None);
    }
}
