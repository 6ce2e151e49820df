//! Hidden states of all windows between two layers: in memory, or in a scratch file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use crate::error::{Error, Locate, Result};
use crate::forward::Hidden;

/// Bytes of the hidden states of one batch; what a layer makes of them is a few times as much.
const BATCH: usize = 32 << 20;

/// Consecutive windows of at most [`BATCH`] bytes of hidden states, at least one. `rows` counts a
/// window's tokens. The batches do not depend on where states are kept, so neither do the bits.
pub(crate) fn batches(rows: &[usize], width: usize) -> Vec<Range<usize>> {
    let most = BATCH / (4 * width.max(1));
    let (mut batches, mut start, mut held) = (Vec::new(), 0, 0);
    for (i, &rows) in rows.iter().enumerate() {
        if i > start && held + rows > most {
            batches.push(start..i);
            (start, held) = (i, 0);
        }
        held += rows;
    }
    if start < rows.len() {
        batches.push(start..rows.len());
    }
    batches
}

/// The states of all batches, each taken and put back in turn.
#[derive(Debug)]
pub(crate) enum States {
    /// All in memory.
    Memory(Vec<Option<Hidden>>),
    /// Only the batch that is taken.
    Scratch(Scratch, Vec<Slot>),
}

/// Where a batch lies in the scratch file.
#[derive(Debug)]
pub(crate) struct Slot {
    at: u64,
    shape: (usize, usize),
    windows: Vec<Range<usize>>,
}

impl States {
    /// Memory for up to `limit` of `bytes` bytes, else a scratch file in `folder`.
    pub(crate) fn new(bytes: u64, limit: u64, folder: &Path) -> Result<Self> {
        Ok(match bytes > limit {
            false => Self::Memory(Vec::new()),
            true => Self::Scratch(Scratch::create(folder)?, Vec::new()),
        })
    }

    /// Appends a batch.
    pub(crate) fn push(&mut self, hidden: Hidden) -> Result<()> {
        match self {
            Self::Memory(all) => all.push(Some(hidden)),
            Self::Scratch(scratch, slots) => {
                let at = slots.last().map_or(0, |s| s.at + 4 * (s.shape.0 * s.shape.1) as u64);
                scratch.write(at, &hidden.states)?;
                let (shape, windows) = (hidden.states.dim(), hidden.windows);
                slots.push(Slot { at, shape, windows });
            }
        }
        Ok(())
    }

    /// Bytes of the hidden states of all batches that are not taken.
    pub(crate) fn bytes(&self) -> u64 {
        let numbers: usize = match self {
            Self::Memory(all) => all.iter().flatten().map(|hidden| hidden.states.len()).sum(),
            Self::Scratch(_, slots) => slots.iter().map(|slot| slot.shape.0 * slot.shape.1).sum(),
        };
        4 * numbers as u64
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Memory(all) => all.len(),
            Self::Scratch(_, slots) => slots.len(),
        }
    }

    /// Takes batch `i`, which is to be put back.
    pub(crate) fn take(&mut self, i: usize) -> Result<Hidden> {
        let found = match self {
            Self::Memory(all) => all.get_mut(i).and_then(Option::take),
            Self::Scratch(scratch, slots) => match slots.get(i) {
                None => None,
                Some(slot) => {
                    let states = scratch.read(slot.at, slot.shape)?;
                    Some(Hidden { states, windows: slot.windows.clone() })
                }
            },
        };
        found.ok_or_else(|| Error::range("batch of hidden states", "one that is there", i))
    }

    /// Puts batch `i` back.
    pub(crate) fn put(&mut self, i: usize, hidden: Hidden) -> Result<()> {
        match self {
            Self::Memory(all) => {
                if let Some(slot) = all.get_mut(i) {
                    *slot = Some(hidden);
                }
                Ok(())
            }
            Self::Scratch(scratch, slots) => match slots.get(i) {
                Some(slot) => scratch.write(slot.at, &hidden.states),
                None => Ok(()),
            },
        }
    }
}

/// A file that is removed when it is no longer needed.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    fn create(folder: &Path) -> Result<Self> {
        let name = |i: u32| folder.join(format!(".mcsmoe.{}.{i}.scratch", std::process::id()));
        let mut i = 0;
        loop {
            let path = name(i);
            match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { path, file }),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && i < u32::MAX => i += 1,
                Err(e) => return Err(Error::io("create scratch file", e)).in_file(&path),
            }
        }
    }

    fn write(&mut self, at: u64, states: &Array2<f32>) -> Result<()> {
        let rows = states.as_standard_layout();
        let bytes: &[u8] = bytemuck::cast_slice(rows.as_slice().unwrap_or_default());
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|e| Error::io("write scratch file", e)).in_file(&self.path)
    }

    fn read(&mut self, at: u64, shape: (usize, usize)) -> Result<Array2<f32>> {
        let mut values = vec![0f32; shape.0 * shape.1];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        let read = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(bytes));
        read.map_err(|e| Error::io("read scratch file", e)).in_file(&self.path)?;
        let found = values.len();
        Array2::from_shape_vec(shape, values)
            .map_err(|_| Error::shape("batch of hidden states", shape, found))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to tell; the name says what it is.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_whole_windows_and_all_of_them() {
        let width = BATCH / 4 / 10;
        assert_eq!(batches(&[4, 5, 2, 11, 1, 9], width), [0..2, 2..3, 3..4, 4..6]);
        assert!(batches(&[], width).is_empty());
    }

    #[test]
    fn a_scratch_file_gives_back_what_was_put_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = |rows: usize, x: f32| Hidden {
            states: Array2::from_shape_fn((rows, 3), |(i, j)| x + (i * 3 + j) as f32),
            windows: vec![0..1, 1..rows],
        };
        let mut states = States::new(100, 99, dir.path()).unwrap();
        states.push(hidden(4, 0.5)).unwrap();
        states.push(hidden(2, 7.0)).unwrap();
        let taken = states.take(0).unwrap();
        assert_eq!(taken, hidden(4, 0.5));
        states.put(0, hidden(4, -1.0)).unwrap();
        assert_eq!(states.take(1).unwrap(), hidden(2, 7.0));
        assert_eq!(states.take(0).unwrap(), hidden(4, -1.0));
        assert!(states.take(2).is_err() && states.len() == 2);
        drop(states);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(matches!(States::new(99, 99, dir.path()).unwrap(), States::Memory(_)));
    }
}
