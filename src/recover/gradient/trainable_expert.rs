//! One expert in training: its matrices, and its forward and backward pass on a batch.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, Zip, s};

use super::adam::Param;
use super::kernels::{Back, activate};
use crate::error::Result;
use crate::linalg::Compute;
use crate::model::{Activation, Expert, Linear};

/// A projection in training.
#[derive(Debug, Clone)]
struct TrainableLinear {
    weight: Param,
    bias: Option<Param>,
}

impl TrainableLinear {
    fn new(linear: Linear) -> Self {
        Self { weight: Param::new(linear.weight), bias: linear.bias.map(Param::row) }
    }

    fn linear(&self) -> Linear {
        Linear { weight: self.weight.value.clone(), bias: self.bias.as_ref().map(Param::to_row) }
    }

    /// `out ← X Wᵀ + b`.
    fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        out: &mut Buffer,
        compute: &dyn Compute,
    ) -> Result<()> {
        compute.gemm(1.0, x, self.weight.value.t(), 0.0, out.0.slice_mut(s![..x.nrows(), ..]))?;
        if let Some(bias) = &self.bias {
            let mut out = out.0.slice_mut(s![..x.nrows(), ..]);
            out += &bias.value.row(0);
        }
        Ok(())
    }

    /// The gradient from that of the output, `δ: (t, out)`, and the input `X: (t, in)`; for the
    /// bias, `δ` still has to be weighted.
    fn backward(
        &mut self,
        delta: ArrayView2<'_, f32>,
        x: ArrayView2<'_, f32>,
        weight: impl Fn(usize) -> f32,
        compute: &dyn Compute,
    ) -> Result<()> {
        compute.gemm(1.0, delta.t(), x, 0.0, self.weight.gradient.view_mut())?;
        if let Some(bias) = &mut self.bias {
            let mut sum = bias.gradient.row_mut(0);
            sum.fill(0.0);
            let rows = delta.rows().into_iter().enumerate();
            rows.for_each(|(i, row)| sum.scaled_add(weight(i), &row));
        }
        Ok(())
    }

    fn step(&mut self, rate: f64) {
        self.weight.step(rate);
        self.bias.iter_mut().for_each(|bias| bias.step(rate));
    }
}

/// A matrix that keeps its memory from batch to batch; the first rows are in use.
#[derive(Debug, Clone)]
struct Buffer(Array2<f32>);

impl Buffer {
    fn new(cols: usize) -> Self {
        Self(Array2::zeros((0, cols)))
    }

    fn grow(&mut self, rows: usize) {
        if self.0.nrows() < rows {
            self.0 = Array2::zeros((rows.next_power_of_two(), self.0.ncols()));
        }
    }

    fn rows(&self, n: usize) -> ArrayView2<'_, f32> {
        self.0.slice(s![..n, ..])
    }

    fn values(&mut self, n: usize) -> &mut [f32] {
        let len = n * self.0.ncols();
        self.0.as_slice_mut().map_or(&mut [], |values| &mut values[..len])
    }
}

/// One expert in training.
#[derive(Debug, Clone)]
pub(super) struct TrainableExpert {
    activation: Activation,
    gate: Option<TrainableLinear>,
    up: TrainableLinear,
    down: TrainableLinear,
    /// `(n, d_model)` inputs; `(n, d_ff)` projections, hidden activations and their gradient;
    /// `(n, d_model)` outputs, then their gradient.
    x: Buffer,
    gates: Buffer,
    ups: Buffer,
    hidden: Buffer,
    delta: Buffer,
    y: Buffer,
}

impl TrainableExpert {
    pub(super) fn new(expert: &Expert) -> Self {
        let (view, (gate, up, down)) = (expert.view(), expert.clone().into_parts());
        let (d, f) = (Buffer::new(view.d_model()), Buffer::new(view.d_ff()));
        Self {
            activation: view.activation,
            gate: gate.map(TrainableLinear::new),
            up: TrainableLinear::new(up),
            down: TrainableLinear::new(down),
            x: d.clone(),
            y: d,
            gates: f.clone(),
            ups: f.clone(),
            hidden: f.clone(),
            delta: f,
        }
    }

    pub(super) fn expert(&self) -> Result<Expert> {
        let gate = self.gate.as_ref().map(TrainableLinear::linear);
        Expert::new(gate, self.up.linear(), self.down.linear(), self.activation)
    }

    /// Runs the expert on the rows `visits` of `x` and keeps what the way back needs.
    pub(super) fn forward(
        &mut self,
        visits: &[(usize, f32)],
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<()> {
        let n = visits.len();
        if n == 0 {
            return Ok(());
        }
        let d_sized = [&mut self.x, &mut self.y];
        let f_sized = [&mut self.gates, &mut self.ups, &mut self.hidden, &mut self.delta];
        d_sized.into_iter().chain(f_sized).for_each(|buffer| buffer.grow(n));
        gather(visits, x, &mut self.x);
        if let Some(gate) = &self.gate {
            gate.forward(self.x.rows(n), &mut self.gates, compute)?;
        }
        self.up.forward(self.x.rows(n), &mut self.ups, compute)?;
        let gates = self.gate.is_some().then(|| &*self.gates.values(n));
        activate(self.activation, gates, self.ups.values(n), self.hidden.values(n));
        self.down.forward(self.hidden.rows(n), &mut self.y, compute)
    }

    /// The output for the `i`-th visit of the last batch, not weighted.
    pub(super) fn output(&self, i: usize) -> ArrayView1<'_, f32> {
        self.y.0.row(i)
    }

    /// The gradients of all matrices, given those of the layer's output, `(t, d_model)`; returns
    /// the gradient of each visit's weight.
    pub(super) fn backward(
        &mut self,
        visits: &[(usize, f32)],
        upstream: ArrayView2<'_, f32>,
        learn: bool,
        compute: &dyn Compute,
    ) -> Result<Vec<f32>> {
        let n = visits.len();
        if n == 0 {
            return Ok(Vec::new());
        }
        gather(visits, upstream, &mut self.y);
        let down = &self.down.weight.value;
        compute.gemm(1.0, self.y.rows(n), down.view(), 0.0, self.delta.0.slice_mut(s![..n, ..]))?;
        let mut weights = self.back_through_units(visits);
        if let Some(bias) = &self.down.bias {
            let bias = bias.value.row(0);
            Zip::from(&mut weights[..])
                .and(self.y.rows(n).rows())
                .for_each(|w, g| *w += g.dot(&bias));
        }
        if learn {
            let (y, hidden, x) = (self.y.rows(n), self.hidden.rows(n), self.x.rows(n));
            self.down.backward(y, hidden, |i| visits[i].1, compute)?;
            self.up.backward(self.ups.rows(n), x, |_| 1.0, compute)?;
            if let Some(gate) = &mut self.gate {
                gate.backward(self.gates.rows(n), x, |_| 1.0, compute)?;
            }
        }
        Ok(weights)
    }

    /// Replaces projections by their gradients and hidden activations by weighted ones.
    fn back_through_units(&mut self, visits: &[(usize, f32)]) -> Vec<f32> {
        let (n, f) = (visits.len(), self.delta.0.ncols().max(1));
        let (act, gated) = (self.activation, self.gate.is_some());
        let delta = self.delta.values(n).chunks_exact(f);
        let mut gates = self.gates.values(n).chunks_exact_mut(f);
        let ups = self.ups.values(n).chunks_exact_mut(f);
        let hidden = self.hidden.values(n).chunks_exact_mut(f);
        let rows = visits.iter().zip(delta).zip(ups).zip(hidden);
        rows.map(|((((_, weight), delta), up), hidden)| {
            let gate = gates.next().filter(|_| gated);
            Back { act, weight: *weight, delta, gate, up, hidden }.run()
        })
        .collect()
    }

    pub(super) fn step(&mut self, rate: f64) {
        self.gate.iter_mut().for_each(|gate| gate.step(rate));
        self.up.step(rate);
        self.down.step(rate);
    }

    /// Values and gradients of all parts, for tests.
    #[cfg(test)]
    pub(super) fn params(&mut self) -> Vec<&mut Param> {
        let layers = self.gate.iter_mut().chain([&mut self.up, &mut self.down]);
        layers.flat_map(|layer| [Some(&mut layer.weight), layer.bias.as_mut()]).flatten().collect()
    }
}

fn gather(visits: &[(usize, f32)], from: ArrayView2<'_, f32>, into: &mut Buffer) {
    for ((t, _), mut row) in visits.iter().zip(into.0.axis_iter_mut(Axis(0))) {
        row.assign(&from.row(*t));
    }
}
