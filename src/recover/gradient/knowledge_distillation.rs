//! The paper's distillation, a layer at a time.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use serde::{Deserialize, Serialize};

use super::training_loop::TrainingLoop;
use crate::error::{Error, Result};
use crate::model::MergedLayer;
use crate::recover::recoverer;
use crate::stage::{Context, Recovery, Stage};

/// How hidden states are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenLoss {
    /// `ln (Σ_x ‖y − t‖² / (b d_model))`.
    #[default]
    LogMse,
    /// `mean_x (1 − cos(y, t)) / 2`.
    Cosine,
}

/// Trains the experts on the losses of the paper's fine-tuning, between the outputs of the merged
/// layer, `y(x)`, and of the original one, `t(x)`, on a batch of `b` tokens:
///
/// `L = hidden · H(y, t) + alpha · mean_x KL(softmax(t / T) ‖ softmax(y / T))`,
///
/// `H` the logarithm of the mean squared error, or the cosine. Router rows are frozen, as the paper
/// freezes them; Adam, a linear warm-up of 16 steps, then linearly to 0. After every epoch the
/// held-out rows are evaluated by squared error; the best state is returned, the layer as it came
/// if none is better. Cost and memory: those of [`Distill`](crate::recover::Distill).
///
/// Source: arXiv 2310.01334, §3.2, with the weights of its code: `α = 0.2`, `T = 2`, 10 epochs.
/// *Deviations:* the paper trains the whole model, on the task's loss, on KL of the logits, and
/// optionally on hidden states; a layer alone has neither labels nor logits, so the task's loss is
/// left out, the hidden-state term is on, and KL compares the layer's outputs as if they were
/// logits. KL is a mean over tokens, where the code's grows with their number, and unscaled by
/// `T²`, as there. Adam's decays are 0.9 and 0.999, without weight decay (0.9, 0.98 and 0.01
/// there).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnowledgeDistillation {
    /// Passes over the tokens.
    pub epochs: usize,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// Tokens per step; at least 1.
    pub batch: usize,
    /// Weight of the hidden-state term; 0 or more.
    pub hidden: f64,
    /// What it is.
    pub hidden_loss: HiddenLoss,
    /// Weight of the KL term; 0 or more.
    pub alpha: f64,
    /// The temperature of both distributions; above 0.
    pub temperature: f64,
    /// Steps to the full learning rate.
    pub warm_up: usize,
}

impl Default for KnowledgeDistillation {
    fn default() -> Self {
        Self {
            epochs: 10,
            learning_rate: 1e-3,
            batch: 512,
            hidden: 1.0,
            hidden_loss: HiddenLoss::LogMse,
            alpha: 0.2,
            temperature: 2.0,
            warm_up: 16,
        }
    }
}

impl Stage for KnowledgeDistillation {
    fn name(&self) -> &str {
        "paper"
    }
}

recoverer!(KnowledgeDistillation);

impl KnowledgeDistillation {
    fn fit(&self, task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer> {
        for (weight, what) in [(self.hidden, "hidden-state loss"), (self.alpha, "KL loss")] {
            if !weight.is_finite() || weight < 0.0 {
                return Err(Error::range(format!("weight of the {what}"), "0 or more", weight));
            }
        }
        if !self.temperature.is_finite() || self.temperature <= 0.0 {
            return Err(Error::range("temperature", "above 0", self.temperature));
        }
        let (epochs, batch) = (self.epochs, self.batch);
        let learning_rate = self.learning_rate;
        let training = TrainingLoop { epochs, batch, learning_rate, experts: true, router: false };
        let schedule = |step: usize, steps: usize| {
            let warm = (step + 1) as f64 / self.warm_up.max(1) as f64;
            warm.min((steps - step) as f64 / steps.saturating_sub(self.warm_up).max(1) as f64)
        };
        training.run(task, merged, schedule, |residual, t| self.loss_gradient(residual, t), cx)
    }

    /// Turns `y − t` into `∂L/∂y`.
    fn loss_gradient(&self, mut residual: ArrayViewMut2<'_, f32>, targets: ArrayView2<'_, f32>) {
        let rows = residual.nrows() as f64;
        let square: f64 = residual.iter().map(|&m| f64::from(m) * f64::from(m)).sum();
        for (mut row, t) in residual.rows_mut().into_iter().zip(targets.rows()) {
            let y: Vec<f64> =
                row.iter().zip(t).map(|(&m, &t)| f64::from(m) + f64::from(t)).collect();
            let hidden: Vec<f64> = match self.hidden_loss {
                HiddenLoss::LogMse => {
                    let by = if square > 0.0 { 2.0 / square } else { 0.0 };
                    row.iter().map(|&m| by * f64::from(m)).collect()
                }
                HiddenLoss::Cosine => cosine_gradient(&y, t, rows),
            };
            self.combine(&mut row, &hidden, &y, t, rows);
        }
    }

    fn combine(
        &self,
        out: &mut ArrayViewMut1<'_, f32>,
        hidden: &[f64],
        y: &[f64],
        t: ArrayView1<'_, f32>,
        rows: f64,
    ) {
        let wanted: Vec<f64> = t.iter().map(|&t| f64::from(t)).collect();
        let (given, wanted) = (softmax(y, self.temperature), softmax(&wanted, self.temperature));
        let by = self.alpha / (rows * self.temperature);
        for (i, out) in out.iter_mut().enumerate() {
            *out = (self.hidden * hidden[i] + by * (given[i] - wanted[i])) as f32;
        }
    }
}

/// `∂/∂y` of `(1 − cos(y, t)) / 2b`; 0 where either is 0.
fn cosine_gradient(y: &[f64], t: ArrayView1<'_, f32>, rows: f64) -> Vec<f64> {
    let t: Vec<f64> = t.iter().map(|&t| f64::from(t)).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (yy, tt, yt) = (dot(y, y), dot(&t, &t), dot(y, &t));
    if yy <= 0.0 || tt <= 0.0 {
        return vec![0.0; y.len()];
    }
    let norm = (yy * tt).sqrt();
    y.iter().zip(&t).map(|(y, t)| -(t / norm - yt / norm * y / yy) / (2.0 * rows)).collect()
}

fn softmax(values: &[f64], temperature: f64) -> Vec<f64> {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut p: Vec<f64> = values.iter().map(|v| ((v - top) / temperature).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    fn loss(distillation: &KnowledgeDistillation, y: &Array2<f64>, t: &Array2<f32>) -> f64 {
        let (rows, d) = y.dim();
        let (mut kl, mut square, mut cosine) = (0.0, 0.0, 0.0);
        for (y, t) in y.rows().into_iter().zip(t.rows()) {
            let t = t.mapv(f64::from);
            let (p, q) = (
                softmax(&t.to_vec(), distillation.temperature),
                softmax(&y.to_vec(), distillation.temperature),
            );
            kl += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            square += (&y - &t).mapv(|m| m * m).sum();
            cosine += (1.0 - y.dot(&t) / (y.dot(&y) * t.dot(&t)).sqrt()) / 2.0;
        }
        let hidden = match distillation.hidden_loss {
            HiddenLoss::LogMse => (square / (rows * d) as f64).ln(),
            HiddenLoss::Cosine => cosine / rows as f64,
        };
        distillation.hidden * hidden + distillation.alpha * kl / rows as f64
    }

    #[test]
    fn gradients_are_those_of_the_losses() {
        let value = |(i, j): (usize, usize)| ((i * 7 + j * 3) as f32 * 0.9).sin();
        let t = Array2::from_shape_fn((3, 5), value);
        let y = Array2::from_shape_fn((3, 5), |(i, j)| f64::from(value((j + 1, i + 2))) * 1.5);
        for hidden_loss in [HiddenLoss::LogMse, HiddenLoss::Cosine] {
            let distillation = KnowledgeDistillation {
                hidden: 0.7,
                hidden_loss,
                ..KnowledgeDistillation::default()
            };
            let mut gradient = (&y - &t.mapv(f64::from)).mapv(|m| m as f32);
            distillation.loss_gradient(gradient.view_mut(), t.view());
            for at in [(0, 0), (1, 3), (2, 4)] {
                let moved = |by: f64| {
                    let mut y = y.clone();
                    y[at] += by;
                    loss(&distillation, &y, &t)
                };
                let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!(
                    (f64::from(gradient[at]) - expected).abs() < 1e-5,
                    "{hidden_loss:?} {at:?}"
                );
            }
        }
    }
}
