//! Training by gradients: the loop that distillation by any loss shares.

use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::trainable_layer::{TrainStep, TrainableLayer};
use crate::error::{Error, ErrorKind, Result};
use crate::model::MergedLayer;
use crate::recover::best_so_far::BestSoFar;
use crate::stage::{Context, Recovery};

/// How long, how fast, and what is trained.
pub(super) struct TrainingLoop {
    pub(super) epochs: usize,
    pub(super) batch: usize,
    pub(super) learning_rate: f64,
    pub(super) experts: bool,
    pub(super) router: bool,
}

impl TrainingLoop {
    fn check(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::range("tokens per distillation step", "at least 1", 0));
        }
        if !self.learning_rate.is_finite() || self.learning_rate <= 0.0 {
            return Err(Error::range("learning rate", "above 0", self.learning_rate));
        }
        Ok(())
    }

    /// Trains by Adam: `schedule(step, steps)` is the factor of the learning rate, `loss_gradient`
    /// turns the residual of a batch, `y − t: (rows, d_model)`, into the loss's gradient by `y`,
    /// given `t`. After every epoch the held-out rows are evaluated; the best state is returned, or
    /// the layer as it came.
    pub(super) fn run(
        &self,
        task: &Recovery<'_>,
        merged: MergedLayer,
        schedule: impl Fn(usize, usize) -> f64,
        loss_gradient: impl Fn(ArrayViewMut2<'_, f32>, ArrayView2<'_, f32>),
        cx: &Context,
    ) -> Result<MergedLayer> {
        self.check()?;
        task.check(&merged)?;
        let fitted = task.fitted();
        if fitted == 0 || !(self.experts || self.router) {
            return Ok(merged);
        }
        let mut trainable = TrainableLayer::new(&merged, task.narrowed, self.batch);
        let mut order: Vec<usize> = (0..fitted).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(cx.seed());
        rng.set_stream(merged.id.index as u64 * 3 + merged.id.stack as u64);
        let mut least = trainable.loss(task, task.held_out_rows(), cx)?;
        let mut best = None;
        let steps = self.epochs * fitted.div_ceil(self.batch);
        let mut step = 0;
        'training: for _ in 0..self.epochs {
            order.shuffle(&mut rng);
            for rows in order.chunks(self.batch) {
                let rate = self.learning_rate * schedule(step, steps);
                let how = TrainStep { experts: self.experts, router: self.router, rate };
                let pass = trainable.forward(task, rows, cx)?;
                let targets = task.targets.select(Axis(0), rows);
                loss_gradient(trainable.residual_mut(&pass), targets.view());
                match trainable.backward_along(&pass, how, cx) {
                    // Diverged: what was best before stands.
                    Err(e) if matches!(e.kind(), ErrorKind::NotFinite { .. }) => break 'training,
                    done => done?,
                }
                step += 1;
            }
            let loss = trainable.loss(task, task.held_out_rows(), cx)?;
            if loss < least {
                least = loss;
                best = Some(trainable.layer(&merged)?);
            }
        }
        let Some(trained) = best else { return Ok(merged) };
        let mut best = BestSoFar::new(task, &merged, cx)?;
        best.consider(trained, cx)?;
        Ok(best.or(merged))
    }
}
