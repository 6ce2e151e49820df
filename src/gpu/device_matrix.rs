//! A matrix in the device's memory, which a randomised SVD multiplies many times.

use ndarray::{ArrayView2, ArrayViewMut2, s};

use super::buffers::Use;
use super::device::Device;
use super::gemm::{Cut, Operand, Panels, record};
use super::kernels::{Batch, GROUPS};
use super::upload::{Block, ReadBack, copy_into, upload};
use crate::error::{Error, Result};
use crate::linalg::DeviceMatrix;

/// A matrix in blocks.
#[derive(Debug)]
pub(super) struct Matrix<'d> {
    device: &'d Device,
    shape: [usize; 2],
    step: [usize; 2],
    blocks: Vec<Block<'d>>,
}

/// The binding 0 of `row_norms.wgsl`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sizes {
    shape: [u32; 2],
    strides: [u32; 2],
    add: u32,
    zero: u32,
}

impl<'d> Matrix<'d> {
    pub(super) fn new(device: &'d Device, a: ArrayView2<'_, f32>) -> Result<Self> {
        let (m, n) = a.dim();
        let Cut { m: tall, n: wide, .. } = Cut::new([m, 1, n], device.block_len());
        let blocks = device.run("upload", || {
            let mut blocks = Vec::new();
            for rows in Cut::ranges(m, tall) {
                for cols in Cut::ranges(n, wide) {
                    let mut batch = Batch::new(device);
                    let view = a.slice(s![rows.clone(), cols]);
                    blocks.push(upload(&mut batch, view, None)?);
                    batch.submit();
                }
            }
            Ok(blocks)
        })?;
        Ok(Self { device, shape: [m, n], step: [tall, wide], blocks })
    }

    /// A block of the matrix, or of its transpose.
    fn block(&self, transposed: bool, at: [usize; 2]) -> Operand<'_, 'd> {
        let across = self.shape[1].div_ceil(self.step[1]);
        let [i, j] = if transposed { [at[1], at[0]] } else { at };
        let block = &self.blocks[i * across + j];
        let strides = if transposed { block.transposed() } else { block.strides };
        Operand { lease: &block.lease, strides }
    }
}

impl DeviceMatrix for Matrix<'_> {
    fn multiply(
        &self,
        transposed: bool,
        b: ArrayView2<'_, f32>,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<()> {
        let turn = |[m, k]: [usize; 2]| if transposed { [k, m] } else { [m, k] };
        let ([m, k], [tall, deep], n) = (turn(self.shape), turn(self.step), b.ncols());
        if b.nrows() != k || out.dim() != (m, n) {
            let found = ((m, k), b.dim(), out.dim());
            return Err(Error::shape("product", "(m, k) (k, n) (m, n)", found));
        }
        if m == 0 || n == 0 || k == 0 {
            out.fill(0.0);
            return Ok(());
        }
        let wide = n.min((self.device.block_len() / tall.max(deep)).max(1));
        let rows: Vec<_> = Cut::ranges(m, tall).collect();
        let cols: Vec<_> = Cut::ranges(n, wide).collect();
        self.device.run("product", || {
            let mut back = ReadBack::new(self.device);
            let mut right = Panels::new(b, [deep, wide]);
            let mut batch = Batch::new(self.device);
            for (i, rows) in rows.iter().enumerate() {
                for (j, cols) in cols.iter().enumerate() {
                    let c = batch.take(Use::Storage, 4 * (rows.len() * cols.len()) as u64);
                    for (step, inner) in Cut::ranges(k, deep).enumerate() {
                        let a = self.block(transposed, [i, step]);
                        let shape = [rows.len(), inner.len(), cols.len()];
                        let scale = [1.0, if step == 0 { 0.0 } else { 1.0 }];
                        let b = right.get(&mut batch, [step, j])?;
                        record(&mut batch, shape, scale, a, b, &c);
                    }
                    back.add(&mut batch, &c);
                    batch.hold(c);
                }
            }
            back.finish(batch, |at, values| {
                let (i, j) = (at / cols.len(), at % cols.len());
                copy_into(out.slice_mut(s![rows[i].clone(), cols[j].clone()]), values);
                Ok(())
            })
        })
    }

    fn row_squares(&self) -> Result<Vec<f64>> {
        let [m, n] = self.shape;
        if m == 0 || n == 0 {
            return Ok(vec![0.0; m]);
        }
        let mut squares = Vec::with_capacity(m);
        self.device.run("row norms", || {
            let mut back = ReadBack::new(self.device);
            let mut batch = Batch::new(self.device);
            for (i, rows) in Cut::ranges(m, self.step[0]).enumerate() {
                let sums = batch.take(Use::Storage, 8 * rows.len() as u64);
                for (j, cols) in Cut::ranges(n, self.step[1]).enumerate() {
                    let Operand { lease, strides } = self.block(false, [i, j]);
                    let shape = [rows.len() as u32, cols.len() as u32];
                    let sizes = Sizes { shape, strides, add: u32::from(j > 0), zero: 0 };
                    let x = shape[0].min(GROUPS);
                    let groups = [x, shape[0].div_ceil(GROUPS)];
                    let kernel = &self.device.kernels.row_norms;
                    batch.dispatch(kernel, sizes, &[lease, &sums], groups);
                }
                back.add(&mut batch, &sums);
                batch.hold(sums);
            }
            back.finish(batch, |_, values| {
                let (pairs, _) = values.as_chunks::<2>();
                squares.extend(pairs.iter().map(|[high, low]| f64::from(*high) + f64::from(*low)));
                Ok(())
            })
        })?;
        Ok(squares)
    }
}
