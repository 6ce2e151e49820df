//! A merged layer in training: one batch forward and back.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::trainable_expert::TrainableExpert;
use super::trainable_router::{TrainableRouter, slot_gradients};
use crate::error::{Locate, Result};
use crate::linalg::Compute;
use crate::model::{MergedLayer, Routing};
use crate::par;
use crate::stage::{Context, Recovery};

/// What is trained, and how fast.
#[derive(Debug, Clone, Copy)]
pub(super) struct TrainStep {
    pub(super) experts: bool,
    pub(super) router: bool,
    pub(super) rate: f64,
}

/// A merged layer in training.
#[derive(Debug)]
pub(super) struct TrainableLayer {
    pub(super) experts: Vec<TrainableExpert>,
    pub(super) gate: TrainableRouter,
    narrowed: bool,
    /// `(batch, d_model)` inputs, and targets that become the residual `y − t`.
    x: Array2<f32>,
    residual: Array2<f32>,
}

/// What the way back of a batch needs.
pub(super) struct ForwardPass {
    rows: usize,
    logits: Array2<f32>,
    routing: Routing,
    visits: Vec<Vec<(usize, f32)>>,
}

#[cfg(test)]
impl ForwardPass {
    pub(super) fn routing(&self) -> &Routing {
        &self.routing
    }
}

impl TrainableLayer {
    pub(super) fn new(merged: &MergedLayer, narrowed: bool, batch: usize) -> Self {
        let (router, map) = merged.choosing(narrowed);
        let buffer = Array2::zeros((batch, router.weight().ncols()));
        Self {
            experts: merged.experts.iter().map(TrainableExpert::new).collect(),
            gate: TrainableRouter::new(router, map),
            narrowed: narrowed && merged.narrowed.is_some(),
            x: buffer.clone(),
            residual: buffer,
        }
    }

    /// The layer as it is now.
    pub(super) fn layer(&self, start: &MergedLayer) -> Result<MergedLayer> {
        let experts: Result<Vec<_>> = self.experts.iter().map(TrainableExpert::expert).collect();
        let mut layer = MergedLayer { experts: experts?, factors: None, ..start.clone() };
        if self.narrowed {
            layer.narrowed = Some(self.gate.router());
        } else {
            layer.router = self.gate.router();
        }
        Ok(layer)
    }

    /// One batch of at most as many rows as it was made for: the residual,
    /// `y − t`, and
    /// what the way back needs.
    pub(super) fn forward(
        &mut self,
        task: &Recovery<'_>,
        rows: &[usize],
        cx: &Context,
    ) -> Result<ForwardPass> {
        let single = cx.per_task();
        for (i, &t) in rows.iter().enumerate() {
            self.x.row_mut(i).assign(&task.inputs.row(t));
            self.residual.row_mut(i).assign(&task.targets.row(t));
        }
        let x = self.x.slice(s![..rows.len(), ..]);
        let (logits, routing) = self.gate.route(x, cx.compute())?;
        let visits = routing.visits(&self.gate.map, self.experts.len());
        par::map_mut(&mut self.experts, |e, expert| {
            expert.forward(&visits[e], x, single.compute()).in_expert(e)
        })?;
        subtract_from(&self.experts, &visits, self.residual.slice_mut(s![..rows.len(), ..]));
        Ok(ForwardPass { rows: rows.len(), logits, routing, visits })
    }

    /// The residual `y − t` of the last batch: `(rows, d_model)`.
    pub(super) fn residual(&self, pass: &ForwardPass) -> ArrayView2<'_, f32> {
        self.residual.slice(s![..pass.rows, ..])
    }

    /// The same, to be turned into the gradient of a loss by the output.
    pub(super) fn residual_mut(&mut self, pass: &ForwardPass) -> ArrayViewMut2<'_, f32> {
        self.residual.slice_mut(s![..pass.rows, ..])
    }

    /// The gradients of `scale / 2 · Σ ‖y − t‖²` over the last batch.
    #[cfg(test)]
    pub(super) fn backward(
        &mut self,
        pass: &ForwardPass,
        scale: f32,
        step: TrainStep,
        cx: &Context,
    ) -> Result<()> {
        self.residual_mut(pass).mapv_inplace(|r| r * scale);
        self.backward_along(pass, step, cx)
    }

    /// The gradients of a loss whose gradient by the output is what
    /// [`TrainableLayer::residual_mut`] now holds, and, when the step has a rate, moves along them.
    /// Experts without a token in the batch are left alone.
    pub(super) fn backward_along(
        &mut self,
        pass: &ForwardPass,
        step: TrainStep,
        cx: &Context,
    ) -> Result<()> {
        let single = cx.per_task();
        let upstream = self.residual.slice(s![..pass.rows, ..]);
        let gradients = par::map_mut(&mut self.experts, |e, expert| {
            let compute: &dyn Compute = single.compute();
            let visits = &pass.visits[e];
            let gradients = expert.backward(visits, upstream, step.experts, compute)?;
            if step.experts && step.rate > 0.0 && !visits.is_empty() {
                expert.step(step.rate);
            }
            Ok(gradients)
        })?;
        if !step.router {
            return Ok(());
        }
        let ForwardPass { logits, routing, visits, .. } = pass;
        let slots = slot_gradients(routing, &self.gate.map, visits, &gradients);
        let x = self.x.slice(s![..pass.rows, ..]);
        self.gate.backward(x, logits, routing, &slots, cx.compute())?;
        if step.rate > 0.0 { self.gate.step(step.rate) } else { Ok(()) }
    }

    /// `Σ ‖y − t‖²` over `rows`, in batches.
    pub(super) fn loss(
        &mut self,
        task: &Recovery<'_>,
        rows: Range<usize>,
        cx: &Context,
    ) -> Result<f64> {
        let rows: Vec<usize> = rows.collect();
        let mut sum = 0.0;
        for batch in rows.chunks(self.x.nrows().max(1)) {
            let pass = self.forward(task, batch, cx)?;
            let residual = self.residual(&pass);
            sum += residual.iter().map(|&m| f64::from(m) * f64::from(m)).sum::<f64>();
        }
        Ok(sum)
    }
}

/// `out ← Σ_e w_e y_e − out`, in parallel over tokens, in expert order for each.
fn subtract_from(
    experts: &[TrainableExpert],
    visits: &[Vec<(usize, f32)>],
    mut out: ArrayViewMut2<'_, f32>,
) {
    const ROWS: usize = 64;
    let d = out.ncols();
    let Some(values) = out.as_slice_mut() else { return };
    par::for_each_chunk(values, ROWS * d, |chunk, rows| {
        rows.iter_mut().for_each(|o| *o = -*o);
        let (first, end) = (chunk * ROWS, chunk * ROWS + rows.len() / d.max(1));
        for (expert, visits) in experts.iter().zip(visits) {
            let start = visits.partition_point(|(t, _)| *t < first);
            let inside = visits[start..].iter().take_while(|(t, _)| *t < end);
            for (i, (t, w)) in inside.enumerate() {
                let row = &mut rows[(t - first) * d..(t - first + 1) * d];
                let y = expert.output(start + i);
                row.iter_mut().zip(y).for_each(|(o, y)| *o += w * y);
            }
        }
    });
}
