//! Copies of matrices to the device and back.

use std::borrow::Cow;
use std::sync::mpsc;

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};
use wgpu::{Buffer, BufferSize, MapMode};

use super::buffers::{Lease, Use};
use super::device::Device;
use super::kernels::{Batch, GROUPS, groups};
use crate::error::Result;

/// A matrix, or a block of one, in device memory.
#[derive(Debug)]
pub(super) struct Block<'d> {
    pub(super) lease: Lease<'d>,
    /// Words between rows and between columns.
    pub(super) strides: [u32; 2],
}

impl Block<'_> {
    /// The strides of the transpose.
    pub(super) fn transposed(&self) -> [u32; 2] {
        [self.strides[1], self.strides[0]]
    }
}

/// Uploads a matrix of at most a block, in the order in which it lies; it is on the device before
/// the batch's commands. `gather` picks rows, and then the order is row by row.
///
/// Values that all fit `bf16` cross in half the bytes.
pub(super) fn upload<'d>(
    batch: &mut Batch<'d>,
    matrix: ArrayView2<'_, f32>,
    gather: Option<&[u32]>,
) -> Result<Block<'d>> {
    let by_columns = gather.is_none() && matrix.strides()[0] == 1 && matrix.strides()[1] != 1;
    let lines = if by_columns { matrix.reversed_axes() } else { matrix };
    let (count, width) = (gather.map_or(lines.nrows(), <[u32]>::len), lines.ncols());
    let lease = batch.take(Use::Storage, 4 * (count * width).max(1) as u64);
    let line = |i: usize| lines.row(gather.map_or(i, |gather| gather[i] as usize));
    let strides = [width as u32, 1];
    let strides = if by_columns { [strides[1], strides[0]] } else { strides };
    let fits = |i: usize| match line(i).as_slice() {
        Some(line) => is_bf16(line),
        None => line(i).iter().all(|x| x.to_bits() & 0xffff == 0),
    };
    if width > 0 && width % 2 == 0 && (0..count).all(fits) {
        packed(batch, &lease, count, width, |i, words| narrow(&dense(&line(i)), words))?;
    } else {
        let refused = || batch.device.refused("upload", "no staging memory");
        if let Some(size) = BufferSize::new(4 * (count * width) as u64) {
            let staged = batch.device.queue.write_buffer_with(&lease.buffer, 0, size);
            let mut staged = staged.ok_or_else(refused)?;
            for i in 0..count {
                let at = 4 * i * width..4 * (i + 1) * width;
                staged.slice(at).copy_from_slice(bytemuck::cast_slice(&dense(&line(i))));
            }
        }
    }
    Ok(Block { lease, strides })
}

/// Whether every value is exact in `bf16`: its lower half is 0. In chunks, so that it vectorises
/// and still ends early.
fn is_bf16(values: &[f32]) -> bool {
    let low = |part: &[f32]| part.iter().fold(0, |low, x| low | (x.to_bits() & 0xffff));
    values.chunks(1024).all(|part| low(part) == 0)
}

/// Two `bf16` to a word, the earlier in the low half; of an even number of values.
fn narrow(values: &[f32], words: &mut Vec<u32>) {
    let (pairs, _) = values.as_chunks::<2>();
    let word = |[low, high]: &[f32; 2]| (low.to_bits() >> 16) | (high.to_bits() & 0xffff_0000);
    words.extend(pairs.iter().map(word));
}

/// A line as it lies, or a copy of it side by side.
fn dense<'a>(line: &'a ArrayView1<'_, f32>) -> Cow<'a, [f32]> {
    line.as_slice().map_or_else(|| Cow::Owned(line.to_vec()), Cow::Borrowed)
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct UnpackSizes {
    n: u32,
    stride: u32,
}

/// Fills a buffer with `count` lines of an even `width`, which `line` appends as packed words.
fn packed<'d>(
    batch: &mut Batch<'d>,
    target: &Lease<'d>,
    count: usize,
    width: usize,
    line: impl Fn(usize, &mut Vec<u32>),
) -> Result<()> {
    let words = count * width / 2;
    let Some(size) = BufferSize::new(4 * words as u64) else { return Ok(()) };
    let source = batch.take(Use::Storage, size.get());
    let staged = batch.device.queue.write_buffer_with(&source.buffer, 0, size);
    let mut staged = staged.ok_or_else(|| batch.device.refused("upload", "no staging memory"))?;
    let mut row = Vec::with_capacity(width / 2);
    for i in 0..count {
        row.clear();
        line(i, &mut row);
        let at = 2 * i * width..2 * (i + 1) * width;
        staged.slice(at).copy_from_slice(bytemuck::cast_slice(&row));
    }
    drop(staged);
    let x = groups(words, 256).min(GROUPS);
    let sizes = UnpackSizes { n: 2 * words as u32, stride: 256 * x };
    let y = groups(words, 256 * x as usize);
    let kernel = &batch.device.kernels.unpack;
    batch.dispatch(kernel, sizes, &[&source, target], [x, y]);
    batch.hold(source);
    Ok(())
}

/// Results on their way to the host: one wait for all of them.
pub(super) struct ReadBack<'d> {
    device: &'d Device,
    parts: Vec<Lease<'d>>,
}

impl<'d> ReadBack<'d> {
    pub(super) fn new(device: &'d Device) -> Self {
        Self { device, parts: Vec::new() }
    }

    /// Records the copy of a result; the parts are numbered in this order.
    pub(super) fn add(&mut self, batch: &mut Batch<'d>, from: &Lease<'_>) {
        let part = batch.take(Use::ReadBack, from.bytes);
        batch.encoder.copy_buffer_to_buffer(&from.buffer, 0, &part.buffer, 0, from.bytes);
        self.parts.push(part);
    }

    /// Submits the batch, waits for it and hands each part to `each`.
    pub(super) fn finish(
        self,
        batch: Batch<'d>,
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let submission = batch.submit();
        let (send, receive) = mpsc::channel();
        for part in &self.parts {
            let send = send.clone();
            part.buffer.map_async(MapMode::Read, 0..part.bytes, move |mapped| {
                // The receiver is gone only when an earlier part failed.
                let _ = send.send(mapped);
            });
        }
        drop(send);
        self.device.wait(submission)?;
        for mapped in receive.iter().take(self.parts.len()) {
            mapped.map_err(|e| self.device.refused("reading back", e))?;
        }
        for (i, part) in self.parts.iter().enumerate() {
            let unmap = Unmap(&part.buffer);
            let view = part.buffer.get_mapped_range(0..part.bytes);
            let view = view.map_err(|e| self.device.refused("reading back", e))?;
            let values = bytemuck::try_cast_slice(&view);
            each(i, values.map_err(|e| self.device.refused("reading back", e))?)?;
            drop(view);
            drop(unmap);
        }
        Ok(())
    }
}

/// A mapped buffer must be unmapped before it is used again, also after an error.
struct Unmap<'a>(&'a Buffer);

impl Drop for Unmap<'_> {
    fn drop(&mut self) {
        self.0.unmap();
    }
}

/// `out ← values`, row by row.
pub(super) fn copy_into(mut out: ArrayViewMut2<'_, f32>, values: &[f32]) {
    let width = out.ncols();
    if width == 0 {
        return;
    }
    for (mut row, values) in out.rows_mut().into_iter().zip(values.chunks_exact(width)) {
        match row.as_slice_mut() {
            Some(row) => row.copy_from_slice(values),
            None => row.iter_mut().zip(values).for_each(|(o, v)| *o = *v),
        }
    }
}

/// The `f32` of a packed word's halves; what the kernel does.
#[cfg(test)]
pub(super) fn widen(word: u32) -> [f32; 2] {
    [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_bf16_is_packed_without_loss() {
        let fits = [1.0, -0.0, 0.5, f32::INFINITY, 3.140_625, -2.5];
        assert!(is_bf16(&fits) && !is_bf16(&[1.0, 0.1]));
        let mut words = Vec::new();
        narrow(&fits, &mut words);
        let back: Vec<u32> = words.iter().flat_map(|&w| widen(w)).map(f32::to_bits).collect();
        assert_eq!(back, fits.map(f32::to_bits));
    }
}
