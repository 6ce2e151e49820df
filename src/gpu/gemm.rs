//! Matrix products in blocks of at most what the device binds, each matrix uploaded once.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, s};

use super::buffers::{Lease, Use};
use super::device::Device;
use super::kernels::{Batch, GROUPS, groups};
use super::upload::{Block, ReadBack, copy_into, upload};
use crate::error::{Error, Result};
use crate::linalg::Product;

/// Side of the tile of C that one workgroup computes.
const TILE: usize = 128;

/// The binding 0 of `gemm.wgsl`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sizes {
    shape: [u32; 3],
    a: [u32; 2],
    b: [u32; 2],
    c_row: u32,
    alpha: f32,
    beta: f32,
}

/// How `(m, k) (k, n)` is cut: steps along the three axes, such that no block exceeds `len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
}

impl Cut {
    /// Whole where possible; otherwise near to square, so that each upload is used often.
    pub(super) fn new([m, k, n]: [usize; 3], len: usize) -> Self {
        let square = whole_tiles(len.isqrt());
        // Room for a depth as large as that: thin slices would be uploaded for little work.
        let most = (len / k.clamp(1, square)).min(TILE * GROUPS as usize);
        let (mut m, mut n) = (m.clamp(1, most), n.clamp(1, most));
        if m * n > len {
            let (short, long) = if m <= n { (&mut m, &mut n) } else { (&mut n, &mut m) };
            *short = (*short).min(square);
            if *short * *long > len {
                *long = whole_tiles(len / *short);
            }
        }
        let k = k.clamp(1, len / m.max(n));
        Self { m, k, n }
    }

    /// The ranges along an axis of `n` in steps of `step`.
    pub(super) fn ranges(n: usize, step: usize) -> impl Iterator<Item = Range<usize>> + Clone {
        (0..n).step_by(step).map(move |i| i..(i + step).min(n))
    }
}

/// Rounds down to tiles, unless there is less than one.
fn whole_tiles(n: usize) -> usize {
    if n < TILE { n } else { n / TILE * TILE }
}

/// A factor that is on the device, with its strides as the product sees it.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a, 'd> {
    pub(super) lease: &'a Lease<'d>,
    pub(super) strides: [u32; 2],
}

impl<'a, 'd> From<&'a Block<'d>> for Operand<'a, 'd> {
    fn from(block: &'a Block<'d>) -> Self {
        Self { lease: &block.lease, strides: block.strides }
    }
}

/// Records `c ← alpha a b + beta c` for blocks of shape `(m, k)`, `(k, n)`, `(m, n)`.
pub(super) fn record(
    batch: &mut Batch<'_>,
    [m, k, n]: [usize; 3],
    [alpha, beta]: [f32; 2],
    a: Operand<'_, '_>,
    b: Operand<'_, '_>,
    c: &Lease<'_>,
) {
    let shape = [m as u32, k as u32, n as u32];
    let sizes = Sizes { shape, a: a.strides, b: b.strides, c_row: n as u32, alpha, beta };
    let deep = 2 * usize::from(a.strides[1] == 1) + usize::from(b.strides[0] == 1);
    let kernel = &batch.device.kernels.gemm[deep];
    batch.dispatch(kernel, sizes, &[a.lease, b.lease, c], [groups(n, TILE), groups(m, TILE)]);
}

/// `out ← Σ alpha A B + beta out`.
pub(super) fn products(
    device: &Device,
    operation: &'static str,
    terms: &[Product<'_>],
    beta: f32,
    mut out: ArrayViewMut2<'_, f32>,
) -> Result<()> {
    let (m, n) = out.dim();
    for Product { a, b, .. } in terms {
        if a.ncols() != b.nrows() || (a.nrows(), b.ncols()) != (m, n) {
            let found = (a.dim(), b.dim(), (m, n));
            return Err(Error::shape(operation, "(m, k) (k, n) (m, n)", found));
        }
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let deepest = terms.iter().map(|term| term.a.ncols()).max().unwrap_or(0);
    if deepest == 0 {
        scale(out, beta);
        return Ok(());
    }
    let cut = Cut::new([m, deepest, n], device.block_len());
    device.run(operation, || {
        let mut job = Job { device, cut, back: ReadBack::new(device) };
        let (rows, cols) = (Cut::ranges(m, cut.m), Cut::ranges(n, cut.n));
        let places: Vec<_> = rows.flat_map(|r| cols.clone().map(move |c| (r.clone(), c))).collect();
        let mut right: Vec<_> =
            terms.iter().map(|term| Panels::new(term.b, [cut.k, cut.n])).collect();
        let mut batch = Batch::new(device);
        let mut left: Vec<Panels<'_, '_>> = Vec::new();
        for (at, (rows, cols)) in places.iter().enumerate() {
            if cols.start == 0 {
                // The panels of A of the rows above are not needed any more.
                let fresh = terms.iter().map(|term| {
                    Panels::new(term.a.slice_move(s![rows.clone(), ..]), [cut.m, cut.k])
                });
                let done = std::mem::replace(&mut left, fresh.collect());
                batch = hold_all(batch, done);
            }
            let old = out.slice(s![rows.clone(), cols.clone()]);
            let c = job.start(&mut batch, old, beta)?;
            batch = job.block(batch, terms, (&mut left, &mut right), cols.clone(), &c, beta)?;
            job.back.add(&mut batch, &c);
            batch.hold(c);
            if at + 1 < places.len() {
                batch.submit();
                batch = Batch::new(device);
            }
        }
        let back = job.back;
        back.finish(batch, |i, values| {
            let (rows, cols) = places[i].clone();
            copy_into(out.slice_mut(s![rows, cols]), values);
            Ok(())
        })
    })
}

/// `out ← beta out`, where 0 does not read it.
fn scale(mut out: ArrayViewMut2<'_, f32>, beta: f32) {
    if beta == 0.0 {
        out.fill(0.0);
    } else {
        out *= beta;
    }
}

struct Job<'d> {
    device: &'d Device,
    cut: Cut,
    back: ReadBack<'d>,
}

impl<'d> Job<'d> {
    /// A block of C; with its old content if that counts.
    fn start(
        &self,
        batch: &mut Batch<'d>,
        old: ArrayView2<'_, f32>,
        beta: f32,
    ) -> Result<Lease<'d>> {
        if beta == 0.0 {
            return Ok(batch.take(Use::Storage, 4 * old.len() as u64));
        }
        let dense = old.as_standard_layout();
        Ok(upload(batch, dense.view(), None)?.lease)
    }

    /// All terms of one block of C. Each step along k is submitted, so that the device works while
    /// the host uploads the next.
    fn block(
        &self,
        mut batch: Batch<'d>,
        terms: &[Product<'_>],
        (left, right): (&mut [Panels<'_, 'd>], &mut [Panels<'_, 'd>]),
        cols: Range<usize>,
        c: &Lease<'d>,
        mut beta: f32,
    ) -> Result<Batch<'d>> {
        for ((term, left), right) in terms.iter().zip(left).zip(right) {
            for (step, deep) in Cut::ranges(term.a.ncols(), self.cut.k).enumerate() {
                let rows = left.matrix.nrows();
                let a = left.get(&mut batch, [0, step])?;
                let b = right.get(&mut batch, [step, cols.start / self.cut.n])?;
                let shape = [rows, deep.len(), cols.len()];
                record(&mut batch, shape, [term.alpha, beta], a, b, c);
                beta = 1.0;
                batch.submit();
                batch = Batch::new(self.device);
            }
        }
        Ok(batch)
    }
}

fn hold_all<'d>(mut batch: Batch<'d>, panels: Vec<Panels<'_, 'd>>) -> Batch<'d> {
    for block in panels.into_iter().flat_map(|panels| panels.blocks).flatten() {
        batch.hold(block.lease);
    }
    batch
}

/// A matrix in blocks, each uploaded when it is first asked for.
pub(super) struct Panels<'a, 'd> {
    pub(super) matrix: ArrayView2<'a, f32>,
    step: [usize; 2],
    across: usize,
    blocks: Vec<Option<Block<'d>>>,
}

impl<'a, 'd> Panels<'a, 'd> {
    pub(super) fn new(matrix: ArrayView2<'a, f32>, step: [usize; 2]) -> Self {
        let counts = [matrix.nrows().div_ceil(step[0]), matrix.ncols().div_ceil(step[1])];
        let blocks = std::iter::repeat_with(|| None).take(counts[0] * counts[1]).collect();
        Self { matrix, step, across: counts[1], blocks }
    }

    /// A block that was asked for before.
    pub(super) fn at(&self, at: [usize; 2]) -> Option<Operand<'_, 'd>> {
        self.blocks[at[0] * self.across + at[1]].as_ref().map(Operand::from)
    }

    /// Uploads a block unless it is there.
    pub(super) fn ready(&mut self, batch: &mut Batch<'d>, at: [usize; 2]) -> Result<()> {
        self.get(batch, at).map(drop)
    }

    /// A block, uploaded if it is not there.
    pub(super) fn get(&mut self, batch: &mut Batch<'d>, at: [usize; 2]) -> Result<Operand<'_, 'd>> {
        let slot = &mut self.blocks[at[0] * self.across + at[1]];
        let block = match slot {
            Some(block) => block,
            None => {
                let range = |axis: usize, n: usize| {
                    let start = at[axis] * self.step[axis];
                    start..(start + self.step[axis]).min(n)
                };
                let (rows, cols) = (range(0, self.matrix.nrows()), range(1, self.matrix.ncols()));
                let view = self.matrix.slice(s![rows, cols]);
                slot.insert(upload(batch, view, None)?)
            }
        };
        Ok(Operand::from(&*block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_block_exceeds_the_limit_and_small_products_stay_whole() {
        assert_eq!(Cut::new([300, 7, 500], 1 << 20), Cut { m: 300, k: 7, n: 500 });
        // The gain of two Mixtral experts within 128 MiB bindings.
        let cut = Cut::new([14336, 4096, 14336], 1 << 25);
        assert_eq!(cut, Cut { m: 5760, k: 4096, n: 5760 });
        // The router on a million tokens: rows are cut before the depth is.
        assert_eq!(Cut::new([1 << 20, 4096, 8], 1 << 25), Cut { m: 8192, k: 4096, n: 8 });
        for shape in [[1, 1, 1], [1, 100_000, 1], [100_000, 3, 2], [999, 999, 999], [17, 5000, 90]]
        {
            for len in [256, 1000, 4096, 1 << 20] {
                let Cut { m, k, n } = Cut::new(shape, len);
                assert!(m * k <= len && k * n <= len && m * n <= len, "{shape:?} {len}");
                assert!(m >= 1 && k >= 1 && n >= 1);
            }
        }
    }

    #[test]
    fn ranges_cover_the_axis() {
        let all: Vec<_> = Cut::ranges(10, 4).collect();
        assert_eq!(all, [0..4, 4..8, 8..10]);
        assert_eq!(Cut::ranges(0, 4).count(), 0);
    }
}
