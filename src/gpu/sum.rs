//! Weighted sums of permuted matrices, for merging.

use ndarray::{Array2, ArrayView2, Axis, s};

use super::buffers::{Lease, Use};
use super::device::Device;
use super::gemm::Cut;
use super::kernels::{Batch, GROUPS, groups, unused};
use super::upload::{ReadBack, copy_into, upload};
use crate::error::Result;
use crate::linalg::{Term, check_terms};

/// The binding 0 of `weighted_sum.wgsl`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sizes {
    shape: [u32; 2],
    strides: [u32; 2],
    weight: f32,
    first: u32,
    gathered: u32,
}

/// `Σ weight · matrix[rows, cols]`.
pub(super) fn weighted_sum(device: &Device, terms: &[Term<'_>]) -> Result<Array2<f32>> {
    let (rows, cols) = check_terms(terms)?;
    let mut out = Array2::zeros((rows, cols));
    if rows == 0 || cols == 0 {
        return Ok(out);
    }
    let len = device.block_len();
    // A gather of columns needs whole rows; where a row alone is too wide, the host gathers.
    let wide = cols.min(len);
    let tall = rows.min(len / wide).min(4 * GROUPS as usize);
    let row_steps: Vec<_> = Cut::ranges(rows, tall).collect();
    let col_steps: Vec<_> = Cut::ranges(cols, wide).collect();
    device.run("weighted sum", || {
        let mut back = ReadBack::new(device);
        let mut batch = Batch::new(device);
        for rows in &row_steps {
            for cols in &col_steps {
                let sum = batch.take(Use::Storage, 4 * (rows.len() * cols.len()) as u64);
                for (i, term) in terms.iter().enumerate() {
                    let part = part(term, rows.clone(), cols.clone());
                    add(&mut batch, &part, &sum, i == 0)?;
                    batch.submit();
                    batch = Batch::new(device);
                }
                back.add(&mut batch, &sum);
                batch.hold(sum);
            }
        }
        back.finish(batch, |at, values| {
            let (i, j) = (at / col_steps.len(), at % col_steps.len());
            copy_into(out.slice_mut(s![row_steps[i].clone(), col_steps[j].clone()]), values);
            Ok(())
        })
    })?;
    Ok(out)
}

/// What of a term falls into a block of the sum.
struct Part<'a> {
    weight: f32,
    matrix: ndarray::CowArray<'a, f32, ndarray::Ix2>,
    rows: Option<&'a [u32]>,
    cols: Option<&'a [u32]>,
}

fn part<'a>(
    term: &Term<'a>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) -> Part<'a> {
    let gathered = term.rows.map(|gather| &gather[rows.clone()]);
    // Gathered rows may be any of the matrix.
    let matrix: ArrayView2<'a, f32> =
        if gathered.is_some() { term.matrix } else { term.matrix.slice_move(s![rows, ..]) };
    let (matrix, indices) = match term.cols {
        Some(indices) if cols.len() < matrix.ncols() => {
            let indices: Vec<usize> = indices[cols].iter().map(|&c| c as usize).collect();
            (matrix.select(Axis(1), &indices).into(), None)
        }
        Some(indices) => (matrix.into(), Some(indices)),
        None => (matrix.slice_move(s![.., cols]).into(), None),
    };
    Part { weight: term.weight, matrix, rows: gathered, cols: indices }
}

fn add<'d>(batch: &mut Batch<'d>, part: &Part<'_>, sum: &Lease<'d>, first: bool) -> Result<()> {
    let (rows, cols) = (part.rows.map_or(part.matrix.nrows(), <[u32]>::len), part.matrix.ncols());
    let block = upload(batch, part.matrix.view(), part.rows)?;
    let gather = match part.cols {
        None => unused(batch),
        Some(indices) => {
            let lease = batch.take(Use::Storage, 4 * indices.len() as u64);
            batch.device.queue.write_buffer(&lease.buffer, 0, bytemuck::cast_slice(indices));
            lease
        }
    };
    let sizes = Sizes {
        shape: [rows as u32, cols as u32],
        strides: block.strides,
        weight: part.weight,
        first: u32::from(first),
        gathered: u32::from(part.cols.is_some()),
    };
    let kernel = &batch.device.kernels.weighted_sum;
    let tiles = [groups(cols, 64), groups(rows, 4)];
    batch.dispatch(kernel, sizes, &[&block.lease, &gather, sum], tiles);
    batch.hold(block.lease);
    batch.hold(gather);
    Ok(())
}
