//! Gram matrices, in pairs of `f32` on the device and `f64` on the host.

use ndarray::{Array2, ArrayView2};

use super::buffers::Use;
use super::device::Device;
use super::gemm::{Cut, Operand, Panels};
use super::kernels::{Batch, groups};
use super::upload::ReadBack;
use crate::error::{Error, Result};

/// Side of the tile of the Gram matrix that one workgroup computes.
const TILE: usize = 64;

/// The binding 0 of `gram.wgsl`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sizes {
    shape: [u32; 3],
    upper: u32,
    add: u32,
    zero: u32,
    x: [u32; 2],
    y: [u32; 2],
}

/// `gram ← gram + Xᵀ X`.
pub(super) fn add_gram(
    device: &Device,
    x: ArrayView2<'_, f32>,
    gram: &mut Array2<f64>,
) -> Result<()> {
    let (t, p) = x.dim();
    if gram.dim() != (p, p) {
        return Err(Error::shape("gram", (p, p), gram.dim()));
    }
    if t == 0 || p == 0 {
        return Ok(());
    }
    let (tall, wide) = steps(t, p, device.block_len());
    let panels: Vec<_> = Cut::ranges(p, wide).collect();
    let pairs: Vec<_> =
        (0..panels.len()).flat_map(|i| (i..panels.len()).map(move |j| (i, j))).collect();
    device.run("gram", || {
        let mut columns = Panels::new(x, [tall, wide]);
        let mut back = ReadBack::new(device);
        let mut batch = Batch::new(device);
        for &(i, j) in &pairs {
            let (p, q) = (panels[i].len(), panels[j].len());
            let sum = batch.take(Use::Storage, 8 * (p * q) as u64);
            for (step, rows) in Cut::ranges(t, tall).enumerate() {
                columns.ready(&mut batch, [step, i])?;
                columns.ready(&mut batch, [step, j])?;
                let (Some(a), Some(b)) = (columns.at([step, i]), columns.at([step, j])) else {
                    return Err(device.refused("gram", "a panel is missing"));
                };
                let sizes = sizes([rows.len(), p, q], i == j, step > 0, a, b);
                let tiles = [groups(q, TILE), groups(p, TILE)];
                batch.dispatch(&device.kernels.gram, sizes, &[a.lease, b.lease, &sum], tiles);
                batch.submit();
                batch = Batch::new(device);
            }
            back.add(&mut batch, &sum);
            batch.hold(sum);
        }
        back.finish(batch, |at, values| {
            let (i, j) = pairs[at];
            add_block(gram, (panels[i].start, panels[j].start), panels[j].len(), values);
            Ok(())
        })
    })
}

fn sizes(
    shape: [usize; 3],
    upper: bool,
    add: bool,
    x: Operand<'_, '_>,
    y: Operand<'_, '_>,
) -> Sizes {
    let shape = shape.map(|n| n as u32);
    let (upper, add) = (u32::from(upper), u32::from(add));
    Sizes { shape, upper, add, zero: 0, x: x.strides, y: y.strides }
}

/// Adds a block of pairs and its mirror image. Below the diagonal a block on it is not defined.
fn add_block(gram: &mut Array2<f64>, (top, left): (usize, usize), width: usize, values: &[f32]) {
    let (pairs, _) = values.as_chunks::<2>();
    for (r, row) in pairs.chunks_exact(width).enumerate() {
        for (c, [high, low]) in row.iter().enumerate() {
            let (i, j) = (top + r, left + c);
            if j < i {
                continue;
            }
            let value = f64::from(*high) + f64::from(*low);
            gram[[i, j]] += value;
            if i != j {
                gram[[j, i]] += value;
            }
        }
    }
}

/// Rows and columns of `X` in a block of at most `len` numbers, such that a square of that many
/// columns, in pairs, is no larger.
fn steps(t: usize, p: usize, len: usize) -> (usize, usize) {
    let wide = p.min((len / 2).isqrt());
    (t.min(len / wide), wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_their_grams_fit() {
        for (t, p) in [(1, 1), (100_000, 7), (3, 100_000), (4096, 14336)] {
            for len in [256, 1 << 12, 1 << 25] {
                let (tall, wide) = steps(t, p, len);
                assert!(tall >= 1 && wide >= 1 && tall * wide <= len && 2 * wide * wide <= len);
            }
        }
    }
}
