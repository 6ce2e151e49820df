//! The memory map: the only unsafe code of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A read-only map of a whole file.
///
/// The file must not be truncated or rewritten in place while it is mapped; whether it was is
/// looked at around every read, see [`super::file_stamp`].
#[derive(Debug)]
pub(crate) struct Map(Mmap);

impl Map {
    /// Maps `file`, which must not be empty.
    pub(crate) fn of(file: &File) -> Result<Self> {
        // SAFETY: the map is read-only and lives as long as every slice taken from it. The
        // remaining condition, that nobody shrinks the file meanwhile, is the caller's: it is
        // documented on `Checkpoint::open`.
        let map = unsafe { Mmap::map(file) }.map_err(|e| Error::io("memory map", e))?;
        Ok(Self(map))
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Tells the system that `range` is not needed for now. A hint: failure changes nothing.
    #[cfg(unix)]
    pub(crate) fn release(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.0.len() {
            return;
        }
        // SAFETY: for a shared, read-only map of a file, MADV_DONTNEED only drops pages; reading
        // them again brings the same bytes back from the file.
        let advice = memmap2::UncheckedAdvice::DontNeed;
        let _ = unsafe { self.0.unchecked_advise_range(advice, range.start, range.len()) };
    }

    /// Tells the system that `range` is not needed for now: there is no such call here.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _: Range<usize>) {}
}
