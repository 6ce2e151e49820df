//! Training by gradients: the loop that distillation by any loss shares.

use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::best::Best;
use super::student::{Lesson, Student};
use crate::error::{Error, ErrorKind, Result};
use crate::model::MergedLayer;
use crate::stage::{Context, Recovery};

/// How long, how fast, and what is trained.
pub(super) struct Course {
    pub(super) epochs: usize,
    pub(super) batch: usize,
    pub(super) learning_rate: f64,
    pub(super) experts: bool,
    pub(super) router: bool,
}

impl Course {
    fn check(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::range("tokens per distillation step", "at least 1", 0));
        }
        if !self.learning_rate.is_finite() || self.learning_rate <= 0.0 {
            return Err(Error::range("learning rate", "above 0", self.learning_rate));
        }
        Ok(())
    }

    /// Trains by Adam: `schedule(step, steps)` is the factor of the learning rate, `slope` turns
    /// what a batch misses, `y − t: (rows, d_model)`, into the loss's gradient by `y`, given `t`.
    /// After every epoch the rows that judge are evaluated; the best state is returned, or the
    /// layer as it came.
    pub(super) fn run(
        &self,
        task: &Recovery<'_>,
        merged: MergedLayer,
        schedule: impl Fn(usize, usize) -> f64,
        slope: impl Fn(ArrayViewMut2<'_, f32>, ArrayView2<'_, f32>),
        cx: &Context,
    ) -> Result<MergedLayer> {
        self.check()?;
        task.check(&merged)?;
        let fitted = task.fitted();
        if fitted == 0 || !(self.experts || self.router) {
            return Ok(merged);
        }
        let mut student = Student::new(&merged, task.narrowed, self.batch);
        let mut order: Vec<usize> = (0..fitted).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(cx.seed());
        rng.set_stream(merged.id.index as u64 * 3 + merged.id.stack as u64);
        let mut least = student.loss(task, task.judging(), cx)?;
        let mut best = None;
        let steps = self.epochs * fitted.div_ceil(self.batch);
        let mut step = 0;
        'training: for _ in 0..self.epochs {
            order.shuffle(&mut rng);
            for rows in order.chunks(self.batch) {
                let rate = self.learning_rate * schedule(step, steps);
                let lesson = Lesson { experts: self.experts, router: self.router, rate };
                let passed = student.forward(task, rows, cx)?;
                slope(student.missed_mut(&passed), task.targets.select(Axis(0), rows).view());
                match student.backward_along(&passed, lesson, cx) {
                    // Diverged: what was best before stands.
                    Err(e) if matches!(e.kind(), ErrorKind::NotFinite { .. }) => break 'training,
                    done => done?,
                }
                step += 1;
            }
            let loss = student.loss(task, task.judging(), cx)?;
            if loss < least {
                least = loss;
                best = Some(student.layer(&merged)?);
            }
        }
        let Some(trained) = best else { return Ok(merged) };
        let mut best = Best::new(task, &merged, cx)?;
        best.offer(trained, cx)?;
        Ok(best.or(merged))
    }
}
