//! A merged layer in training: one batch forward and back.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::pupil::Pupil;
use super::routing::{Gate, slot_gradients};
use crate::error::{Locate, Result};
use crate::linalg::Compute;
use crate::model::{MergedLayer, Routing};
use crate::par;
use crate::stage::{Context, Recovery};

/// What is trained, and how fast.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lesson {
    pub(super) experts: bool,
    pub(super) router: bool,
    pub(super) rate: f64,
}

/// A merged layer in training.
#[derive(Debug)]
pub(super) struct Student {
    pub(super) pupils: Vec<Pupil>,
    pub(super) gate: Gate,
    narrowed: bool,
    /// `(batch, d_model)` inputs, and targets that become what is missed.
    x: Array2<f32>,
    miss: Array2<f32>,
}

/// What the way back of a batch needs.
pub(super) struct Passed {
    rows: usize,
    logits: Array2<f32>,
    routing: Routing,
    visits: Vec<Vec<(usize, f32)>>,
}

#[cfg(test)]
impl Passed {
    pub(super) fn routing(&self) -> &Routing {
        &self.routing
    }
}

impl Student {
    pub(super) fn new(merged: &MergedLayer, narrowed: bool, batch: usize) -> Self {
        let (router, map) = merged.choosing(narrowed);
        let buffer = Array2::zeros((batch, router.weight().ncols()));
        Self {
            pupils: merged.experts.iter().map(Pupil::new).collect(),
            gate: Gate::new(router, map),
            narrowed: narrowed && merged.narrowed.is_some(),
            x: buffer.clone(),
            miss: buffer,
        }
    }

    /// The layer as it is now.
    pub(super) fn layer(&self, start: &MergedLayer) -> Result<MergedLayer> {
        let experts: Result<Vec<_>> = self.pupils.iter().map(Pupil::expert).collect();
        let mut layer = MergedLayer { experts: experts?, factors: None, ..start.clone() };
        if self.narrowed {
            layer.narrowed = Some(self.gate.router());
        } else {
            layer.router = self.gate.router();
        }
        Ok(layer)
    }

    /// One batch of at most as many rows as the student was made for: what is missed, `y − t`, and
    /// what the way back needs.
    pub(super) fn forward(
        &mut self,
        task: &Recovery<'_>,
        rows: &[usize],
        cx: &Context,
    ) -> Result<Passed> {
        let single = cx.per_task();
        for (i, &t) in rows.iter().enumerate() {
            self.x.row_mut(i).assign(&task.inputs.row(t));
            self.miss.row_mut(i).assign(&task.targets.row(t));
        }
        let x = self.x.slice(s![..rows.len(), ..]);
        let (logits, routing) = self.gate.route(x, cx.compute())?;
        let visits = routing.visits(&self.gate.map, self.pupils.len());
        par::map_mut(&mut self.pupils, |e, pupil| {
            pupil.forward(&visits[e], x, single.compute()).in_expert(e)
        })?;
        subtract_from(&self.pupils, &visits, self.miss.slice_mut(s![..rows.len(), ..]));
        Ok(Passed { rows: rows.len(), logits, routing, visits })
    }

    /// What the last batch missed: `(rows, d_model)`.
    pub(super) fn missed(&self, passed: &Passed) -> ArrayView2<'_, f32> {
        self.miss.slice(s![..passed.rows, ..])
    }

    /// The same, to be turned into the gradient of a loss by the output.
    pub(super) fn missed_mut(&mut self, passed: &Passed) -> ArrayViewMut2<'_, f32> {
        self.miss.slice_mut(s![..passed.rows, ..])
    }

    /// The gradients of `scale / 2 · Σ ‖y − t‖²` over the last batch.
    #[cfg(test)]
    pub(super) fn backward(
        &mut self,
        passed: &Passed,
        scale: f32,
        lesson: Lesson,
        cx: &Context,
    ) -> Result<()> {
        self.missed_mut(passed).mapv_inplace(|miss| miss * scale);
        self.backward_along(passed, lesson, cx)
    }

    /// The gradients of a loss whose gradient by the output is what [`Student::missed_mut`] now
    /// holds, and, when there is a lesson to learn, a step along them. Experts without a token in
    /// the batch are left alone.
    pub(super) fn backward_along(
        &mut self,
        passed: &Passed,
        lesson: Lesson,
        cx: &Context,
    ) -> Result<()> {
        let single = cx.per_task();
        let upstream = self.miss.slice(s![..passed.rows, ..]);
        let gradients = par::map_mut(&mut self.pupils, |e, pupil| {
            let compute: &dyn Compute = single.compute();
            let visits = &passed.visits[e];
            let gradients = pupil.backward(visits, upstream, lesson.experts, compute)?;
            if lesson.experts && lesson.rate > 0.0 && !visits.is_empty() {
                pupil.step(lesson.rate);
            }
            Ok(gradients)
        })?;
        if !lesson.router {
            return Ok(());
        }
        let Passed { logits, routing, visits, .. } = passed;
        let slots = slot_gradients(routing, &self.gate.map, visits, &gradients);
        let x = self.x.slice(s![..passed.rows, ..]);
        self.gate.backward(x, logits, routing, &slots, cx.compute())?;
        if lesson.rate > 0.0 { self.gate.step(lesson.rate) } else { Ok(()) }
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
            let passed = self.forward(task, batch, cx)?;
            let miss = self.missed(&passed);
            sum += miss.iter().map(|&m| f64::from(m) * f64::from(m)).sum::<f64>();
        }
        Ok(sum)
    }
}

/// `out ← Σ_e w_e y_e − out`, in parallel over tokens, in expert order for each.
fn subtract_from(pupils: &[Pupil], visits: &[Vec<(usize, f32)>], mut out: ArrayViewMut2<'_, f32>) {
    const ROWS: usize = 64;
    let d = out.ncols();
    let Some(values) = out.as_slice_mut() else { return };
    par::for_each_chunk(values, ROWS * d, |chunk, rows| {
        rows.iter_mut().for_each(|o| *o = -*o);
        let (first, end) = (chunk * ROWS, chunk * ROWS + rows.len() / d.max(1));
        for (pupil, visits) in pupils.iter().zip(visits) {
            let start = visits.partition_point(|(t, _)| *t < first);
            let inside = visits[start..].iter().take_while(|(t, _)| *t < end);
            for (i, (t, w)) in inside.enumerate() {
                let row = &mut rows[(t - first) * d..(t - first + 1) * d];
                let y = pupil.output(start + i);
                row.iter_mut().zip(y).for_each(|(o, y)| *o += w * y);
            }
        }
    });
}
