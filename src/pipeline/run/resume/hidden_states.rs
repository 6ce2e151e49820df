//! Checkpoints of hidden states: those behind a finished layer, on the disk, from which a run along
//! a text goes on after it was killed.
//!
//! A checkpoint of layer `l` is of use once `l` and all before it are written, and the layer after
//! it is merged while `l` is still being written. So the last three are kept. Layers that are
//! redone about as quickly as their states are written are not worth one.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::LayerId;
use crate::pipeline::activations::streams::ResumableStates;

/// Checkpoints that are kept.
const KEPT: usize = 3;
/// How many times as long as the last checkpoint took, the layers after it take before the next is
/// written: checkpoints cost at most a twentieth of a run.
const SAVE_COST_RATIO: u32 = 20;
/// Bytes a second at which the first is expected to be written.
const ASSUMED_DISK_BYTES_PER_S: f64 = 100e6;
/// Bytes of the SHA-256 that ends the file.
const HASH: usize = 32;

/// The checkpoints of hidden states of a run, in its partial folder.
#[derive(Debug)]
pub(crate) struct SavedStates<'a> {
    folder: &'a Path,
    kept: Vec<LayerId>,
    /// When the last was written, or these were opened.
    since: Instant,
    /// How long it took, if one was written.
    cost: Option<Duration>,
}

impl<'a> SavedStates<'a> {
    pub(crate) fn new(folder: &'a Path) -> Self {
        Self { folder, kept: Vec::new(), since: Instant::now(), cost: None }
    }

    /// The last of `layers` behind which the states lie whole.
    pub(crate) fn last_of(folder: &Path, layers: &[LayerId]) -> Option<LayerId> {
        let complete = |id: &&LayerId| is_complete(&path(folder, **id)).unwrap_or(false);
        layers.iter().rev().find(complete).copied()
    }

    /// Writes the states of `pass` as those behind layer `id` if they are worth it. Nothing goes on
    /// behind the last layer.
    pub(crate) fn save(&mut self, pass: &mut dyn ResumableStates, id: LayerId) -> Result<()> {
        let begun = Instant::now();
        let expected = || Duration::from_secs_f64(pass.bytes() as f64 / ASSUMED_DISK_BYTES_PER_S);
        let cost = self.cost.unwrap_or_else(expected);
        if pass.remaining() == 0 || begun - self.since < SAVE_COST_RATIO * cost {
            return Ok(());
        }
        self.write(pass, id)?;
        (self.since, self.cost) = (Instant::now(), Some(begun.elapsed()));
        Ok(())
    }

    fn write(&mut self, pass: &mut dyn ResumableStates, id: LayerId) -> Result<()> {
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
    pub(crate) fn restore(&mut self, pass: &mut dyn ResumableStates, id: LayerId) -> Result<()> {
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
fn is_complete(path: &Path) -> std::io::Result<bool> {
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
    use ndarray::Array2;

    /// One batch, and how many layers are still to come.
    struct Still(Array2<f32>, usize);

    impl ResumableStates for Still {
        fn remaining(&self) -> usize {
            self.1
        }

        fn bytes(&self) -> u64 {
            4 * self.0.len() as u64
        }

        fn jump_behind(&mut self, _: LayerId) -> Result<()> {
            Ok(())
        }

        fn batches(&mut self, f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>) -> Result<()> {
            f(&mut self.0)
        }
    }

    #[test]
    fn states_come_back_and_layers_quickly_redone_are_not_worth_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let states = Array2::from_shape_fn((5, 3), |(i, j)| (i * 3 + j) as f32);
        let mut saved = SavedStates::new(dir.path());
        let set = |saved: &mut SavedStates<'_>, layer: usize, last: usize| {
            let mut still = Still(&states + layer as f32, 6 - layer);
            saved.save(&mut still, LayerId::causal(layer)).unwrap();
            let ids: Vec<_> = (0..9).map(LayerId::causal).collect();
            assert_eq!(SavedStates::last_of(dir.path(), &ids), Some(LayerId::causal(last)));
        };
        // A layer that took a second is worth these few bytes, but not what takes an hour.
        let second = Duration::from_secs(1);
        saved.since -= second;
        set(&mut saved, 0, 0);
        saved.cost = Some(3600 * second);
        set(&mut saved, 1, 0);
        for layer in 2..6 {
            saved.cost = Some(Duration::ZERO);
            set(&mut saved, layer, layer);
        }
        saved.cost = Some(Duration::ZERO);
        set(&mut saved, 6, 5);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), KEPT);
        let mut found = Still(Array2::zeros((5, 3)), 1);
        saved.restore(&mut found, LayerId::causal(4)).unwrap();
        assert_eq!(found.0, &states + 4.0);
    }

    #[test]
    fn a_short_run_writes_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut saved = SavedStates::new(dir.path());
        // 12 MB at a slow disk's speed, twenty times: over two seconds.
        let mut still = Still(Array2::zeros((3000, 1000)), 5);
        saved.save(&mut still, LayerId::causal(0)).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        saved.since -= Duration::from_secs(3);
        saved.save(&mut still, LayerId::causal(1)).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_torn_or_changed_file_is_not_complete() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (LayerId::causal(3), LayerId::causal(4));
        let mut bytes = vec![7; 100];
        bytes.extend_from_slice(&Sha256::digest(&bytes));
        fs::write(path(dir.path(), first), &bytes).unwrap();
        let last = |bytes: &[u8]| {
            fs::write(path(dir.path(), second), bytes).unwrap();
            SavedStates::last_of(dir.path(), &[first, second])
        };
        assert_eq!(last(&bytes), Some(second));
        assert_eq!(last(&bytes[..131]), Some(first));
        assert_eq!(last(&bytes[..10]), Some(first));
        bytes[50] ^= 1;
        assert_eq!(last(&bytes), Some(first));
        assert_eq!(SavedStates::last_of(dir.path(), &[]), None);
    }
}
