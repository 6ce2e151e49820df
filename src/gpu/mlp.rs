//! A whole MLP on the device: nothing but the tokens comes back.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2, Axis};

use super::buffers::{Lease, Use};
use super::device::Device;
use super::gemm::{Cut, Operand, record};
use super::kernels::{Batch, GROUPS, groups, unused};
use super::upload::{Block, ReadBack, copy_into, upload};
use crate::error::{Error, Result};
use crate::linalg::{Activation, LinearView, Mlp};

/// The binding 0 of `activate.wgsl`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sizes {
    shape: [u32; 2],
    act: u32,
    gated: u32,
    biased: u32,
    weighted: u32,
    alpha: f32,
    limit: f32,
}

/// Which part of the MLP is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// The hidden activations.
    Hidden,
    /// The output, without the bias of the down projection.
    Output,
}

/// Whether every matrix is a block, so that the MLP need not be cut but along the tokens.
pub(super) fn fits(device: &Device, mlp: &Mlp<'_>) -> bool {
    let least = mlp.up.weight.len().max(mlp.down.weight.len());
    least <= device.block_len() && mlp.up.weight.nrows() > 0 && mlp.up.weight.ncols() > 0
}

/// Fails unless the projections fit each other and `X`.
pub(super) fn check(mlp: &Mlp<'_>, x: ArrayView2<'_, f32>) -> Result<()> {
    let (f, d) = mlp.up.weight.dim();
    if x.ncols() != d {
        return Err(Error::shape("mlp input", (x.nrows(), d), x.dim()));
    }
    let gate = mlp.gate.map(|gate| (gate, f));
    for (LinearView { weight, bias }, out) in gate.into_iter().chain([(mlp.up, f)]) {
        if weight.dim() != (f, d) || bias.is_some_and(|b| b.len() != out) {
            return Err(Error::shape("mlp projection", (f, d), weight.dim()));
        }
    }
    if mlp.down.weight.ncols() != f {
        return Err(Error::shape("mlp projection", ("d_model", f), mlp.down.weight.dim()));
    }
    Ok(())
}

/// `out ← w ⊙ act(..)`, or the down projection of it. The MLP [`fits`] and was checked.
pub(super) fn run(
    device: &Device,
    mlp: &Mlp<'_>,
    x: ArrayView2<'_, f32>,
    weights: Option<&[f32]>,
    until: Until,
    mut out: ArrayViewMut2<'_, f32>,
) -> Result<()> {
    let (f, d) = mlp.up.weight.dim();
    let widest = f.max(d).max(mlp.down.weight.nrows());
    let tall = x.nrows().min((device.block_len() / widest).clamp(1, 4 * GROUPS as usize)).max(1);
    let steps: Vec<_> = Cut::ranges(x.nrows(), tall).collect();
    device.run("mlp", || {
        let mut batch = Batch::new(device);
        let parts = Parts::upload(&mut batch, mlp, until)?;
        batch.submit();
        let mut batch = Batch::new(device);
        let mut back = ReadBack::new(device);
        for rows in &steps {
            let x = x.slice(ndarray::s![rows.clone(), ..]);
            let weights = weights.map(|w| &w[rows.clone()]);
            let found = parts.block(&mut batch, x, weights)?;
            back.add(&mut batch, &found);
            batch.hold(found);
            if rows.end < out.nrows() {
                batch.submit();
                batch = Batch::new(device);
            }
        }
        back.finish(batch, |i, values| {
            copy_into(out.slice_axis_mut(Axis(0), steps[i].clone().into()), values);
            Ok(())
        })
    })
}

/// An MLP on the device.
struct Parts<'d> {
    gate: Option<Block<'d>>,
    up: Block<'d>,
    down: Option<Block<'d>>,
    /// Biases of the first projection and of up; zeros where only one has one.
    bias: Option<Lease<'d>>,
    /// `d_model`, `d_ff`, and the width of the output.
    widths: [usize; 3],
    activation: Activation,
}

impl<'d> Parts<'d> {
    fn upload(batch: &mut Batch<'d>, mlp: &Mlp<'_>, until: Until) -> Result<Self> {
        let (f, d) = mlp.up.weight.dim();
        let first = mlp.gate.unwrap_or(mlp.up);
        let bias = (first.bias.is_some() || mlp.up.bias.is_some()).then(|| {
            let values =
                |bias: Option<ArrayView1<'_, f32>>| bias.map_or(vec![0.0; f], |b| b.to_vec());
            let bias = [values(first.bias), values(mlp.up.bias)].concat();
            put(batch, &bias)
        });
        let gate = mlp.gate.map(|gate| upload(batch, gate.weight, None)).transpose()?;
        let up = upload(batch, mlp.up.weight, None)?;
        let down = match until {
            Until::Hidden => None,
            Until::Output => Some(upload(batch, mlp.down.weight, None)?),
        };
        let widths = [d, f, mlp.down.weight.nrows()];
        Ok(Self { gate, up, down, bias, widths, activation: mlp.activation })
    }

    /// What was asked for, of a block of tokens.
    fn block(
        &self,
        batch: &mut Batch<'d>,
        x: ArrayView2<'_, f32>,
        weights: Option<&[f32]>,
    ) -> Result<Lease<'d>> {
        let ([d, f, width], t) = (self.widths, x.nrows());
        let x = upload(batch, x, None)?;
        let project = |batch: &mut Batch<'d>, weight: &Block<'d>| {
            let out = batch.take(Use::Storage, 4 * (t * f) as u64);
            let weight = Operand { lease: &weight.lease, strides: weight.transposed() };
            record(batch, [t, d, f], [1.0, 0.0], Operand::from(&x), weight, &out);
            out
        };
        let hidden = project(batch, self.gate.as_ref().unwrap_or(&self.up));
        let up = match self.gate {
            Some(_) => project(batch, &self.up),
            None => unused(batch),
        };
        batch.hold(x.lease);
        self.activate(batch, &hidden, &up, weights, t);
        batch.hold(up);
        let Some(down) = &self.down else { return Ok(hidden) };
        let out = batch.take(Use::Storage, 4 * (t * width) as u64);
        let inner = Operand { lease: &hidden, strides: [f as u32, 1] };
        let weight = Operand { lease: &down.lease, strides: down.transposed() };
        record(batch, [t, f, width], [1.0, 0.0], inner, weight, &out);
        batch.hold(hidden);
        Ok(out)
    }

    fn activate(
        &self,
        batch: &mut Batch<'d>,
        hidden: &Lease<'d>,
        up: &Lease<'d>,
        weights: Option<&[f32]>,
        t: usize,
    ) {
        let (act, alpha, limit) = match self.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::Gelu => (1, 0.0, 0.0),
            Activation::GeluTanh => (2, 0.0, 0.0),
            Activation::Relu => (3, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (4, alpha, limit),
        };
        let f = self.widths[1];
        let sizes = Sizes {
            shape: [t as u32, f as u32],
            act,
            gated: u32::from(self.gate.is_some()),
            biased: u32::from(self.bias.is_some()),
            weighted: u32::from(weights.is_some()),
            alpha,
            limit,
        };
        let none = unused(batch);
        let factors = weights.map(|weights| put(batch, weights));
        let spare = unused(batch);
        let buffers =
            [hidden, up, self.bias.as_ref().unwrap_or(&none), factors.as_ref().unwrap_or(&spare)];
        let kernel = &batch.device.kernels.activate;
        batch.dispatch(kernel, sizes, &buffers, [groups(f, 64), groups(t, 4)]);
        [Some(none), Some(spare), factors].into_iter().flatten().for_each(|l| batch.hold(l));
    }
}

/// A vector on the device.
fn put<'d>(batch: &Batch<'d>, values: &[f32]) -> Lease<'d> {
    let lease = batch.take(Use::Storage, 4 * values.len().max(4) as u64);
    batch.device.queue.write_buffer(&lease.buffer, 0, bytemuck::cast_slice(values));
    lease
}
