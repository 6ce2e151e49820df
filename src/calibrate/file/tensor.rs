//! Typed reads of a tensor's byte range, a block at a time.

use std::fs::File;
use std::ops::Range;

use super::stats_file::FORMAT;
use crate::error::{Error, ErrorKind, Result};
use crate::model::non_finite;
use crate::tensor_file::{Dtype, read_at};

/// Elements that are decoded at a time: the raw bytes never double a tensor's memory.
const BLOCK: usize = 1 << 18;

/// One tensor on disk, its range checked against the file's size by the header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensor<'a> {
    pub(super) file: &'a File,
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [usize],
    pub(super) offset: u64,
}

impl Tensor<'_> {
    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of `range` as `f32`, all finite.
    pub(super) fn floats(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let first = range.start;
        let mut out = Vec::with_capacity(range.len());
        self.blocks(range, |bytes| {
            let values = self.dtype.decode(bytes)?;
            if let Some((i, x)) = non_finite(&values) {
                return Err(not_finite(f64::from(x), first + out.len() + i));
            }
            out.extend(values);
            Ok(())
        })?;
        Ok(out)
    }

    /// All elements as `f64`, all finite; exact for `F64`.
    pub(super) fn wide(&self) -> Result<Vec<f64>> {
        let mut out = Vec::with_capacity(self.len());
        self.blocks(0..self.len(), |bytes| {
            out.extend(self.dtype.decode_f64(bytes)?);
            Ok(())
        })?;
        match out.iter().position(|x| !x.is_finite()) {
            None => Ok(out),
            Some(i) => Err(not_finite(out[i], i)),
        }
    }

    /// Elements of `range` as `i64`.
    pub(super) fn integers(&self, range: Range<usize>) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(range.len());
        self.blocks(range, |bytes| {
            out.extend(self.dtype.decode_integers(bytes)?);
            Ok(())
        })?;
        Ok(out)
    }

    /// Hands the raw bytes of `range` to `read`, at most [`BLOCK`] elements at a time.
    fn blocks(&self, range: Range<usize>, mut read: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if range.end > self.len() {
            let reason = format!("element {} of {}", range.end, self.len());
            return Err(Error::malformed(FORMAT, reason));
        }
        let width = self.dtype.alignment();
        let mut bytes = vec![0; range.len().min(BLOCK) * width];
        for start in range.clone().step_by(BLOCK) {
            let block = &mut bytes[..(range.end - start).min(BLOCK) * width];
            read_at(self.file, block, self.offset + (start * width) as u64)?;
            read(block)?;
        }
        Ok(())
    }
}

fn not_finite(value: f64, index: usize) -> Error {
    ErrorKind::NotFinite { what: "statistic".into(), value, index }.into()
}

/// A tensor of a type that the format does not allow.
pub(super) fn wrong_type(found: Dtype, supported: &str) -> Error {
    let (found, supported) = (found.name().to_owned(), supported.into());
    ErrorKind::Unsupported { what: "data type of a statistic", found, supported }.into()
}
