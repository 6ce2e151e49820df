//! Typed reads of a tensor's byte range, a block at a time.

use std::fs::File;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

use super::header::malformed;
use crate::error::{Error, ErrorKind, Result};
use crate::model::non_finite;

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
        self.decode(range, |dtype, bytes| {
            let at = out.len();
            match dtype {
                Dtype::F32 => each(bytes, |b| out.push(f32::from_le_bytes(b))),
                Dtype::BF16 => each(bytes, |b| out.push(bf16::from_le_bytes(b).to_f32())),
                Dtype::F16 => each(bytes, |b| out.push(f16::from_le_bytes(b).to_f32())),
                other => return Err(wrong_type(other, "F32, BF16, F16")),
            }
            match non_finite(&out[at..]) {
                None => Ok(()),
                Some((i, x)) => Err(not_finite(f64::from(x), first + at + i)),
            }
        })?;
        Ok(out)
    }

    /// All elements as `f64`, all finite; exact for `F64`.
    pub(super) fn wide(&self) -> Result<Vec<f64>> {
        if self.dtype != Dtype::F64 {
            return Ok(self.floats(0..self.len())?.into_iter().map(f64::from).collect());
        }
        let mut out = Vec::with_capacity(self.len());
        self.decode(0..self.len(), |_, bytes| {
            each(bytes, |b| out.push(f64::from_le_bytes(b)));
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
        self.decode(range, |dtype, bytes| {
            match dtype {
                Dtype::I32 => each(bytes, |b| out.push(i64::from(i32::from_le_bytes(b)))),
                Dtype::I64 => each(bytes, |b| out.push(i64::from_le_bytes(b))),
                other => return Err(wrong_type(other, "I32, I64")),
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Hands the raw bytes of `range` to `f`, at most [`BLOCK`] elements at a time.
    fn decode(
        &self,
        range: Range<usize>,
        mut f: impl FnMut(Dtype, &[u8]) -> Result<()>,
    ) -> Result<()> {
        if range.end > self.len() {
            return Err(malformed(format!("element {} of {}", range.end, self.len())));
        }
        let width = self.dtype.bitsize() / 8;
        let mut bytes = vec![0; range.len().min(BLOCK) * width];
        for start in range.clone().step_by(BLOCK) {
            let block = &mut bytes[..(range.end - start).min(BLOCK) * width];
            read_at(self.file, block, self.offset + (start * width) as u64)?;
            f(self.dtype, block)?;
        }
        Ok(())
    }
}

fn each<const N: usize>(bytes: &[u8], mut f: impl FnMut([u8; N])) {
    bytes.as_chunks().0.iter().for_each(|&chunk| f(chunk));
}

fn not_finite(value: f64, index: usize) -> Error {
    ErrorKind::NotFinite { what: "statistic".into(), value, index }.into()
}

/// A tensor of a type that the format does not allow.
pub(super) fn wrong_type(found: Dtype, supported: &str) -> Error {
    let (found, supported) = (format!("{found:?}"), supported.into());
    ErrorKind::Unsupported { what: "data type of a statistic", found, supported }.into()
}

/// Fills `buffer` from `offset` without moving a shared cursor, so that threads may share the file.
pub(in crate::calibrate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    #[cfg(unix)]
    let read = std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    let read = {
        use std::io::{Error, ErrorKind};
        let mut done = 0;
        loop {
            if done == buffer.len() {
                break Ok(());
            }
            let part = &mut buffer[done..];
            match std::os::windows::fs::FileExt::seek_read(file, part, offset + done as u64) {
                Ok(0) => break Err(Error::from(ErrorKind::UnexpectedEof)),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => break Err(e),
            }
        }
    };
    read.map_err(|e| Error::io("read statistics", e))
}
