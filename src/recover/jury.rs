//! The judge of the candidates of a least-squares fit.

use ndarray::Array2;

use super::features::{Features, squares};
use super::normal::Deltas;
use crate::error::Result;
use crate::model::MergedLayer;
use crate::stage::{Context, Recovery};

/// The judging rows up to the down projections, which is all that the candidates differ in.
pub(super) struct Jury {
    features: Features,
    /// What the start misses.
    residual: Array2<f32>,
    /// `Σ ‖·‖²` of what the best so far misses.
    least: f64,
    best: Option<Deltas>,
}

impl Jury {
    /// With the judging rows of `task`.
    pub(super) fn of(task: &Recovery<'_>, start: &MergedLayer, cx: &Context) -> Result<Self> {
        let (features, residual) = Features::of_rows(task, task.judging(), start, cx)?;
        Ok(Self::new(features, residual))
    }

    /// With the features of some rows, and what the start misses there.
    pub(super) fn new(features: Features, residual: Array2<f32>) -> Self {
        let least = squares(residual.view());
        Self { features, residual, least, best: None }
    }

    /// Takes a candidate if it is better than the start and all before; says whether it was. By
    /// more than what a forward pass rounds: it may not find the layer worse than the start.
    pub(super) fn offer(&mut self, deltas: Deltas, cx: &Context) -> Result<bool> {
        let missed = self.features.missed(&self.residual, &deltas, cx)?;
        let better = missed < self.least * (1.0 - f64::from(f32::EPSILON).sqrt());
        if better {
            (self.least, self.best) = (missed, Some(deltas));
        }
        Ok(better)
    }

    /// Whether any candidate was better than the start.
    pub(super) fn found(&self) -> bool {
        self.best.is_some()
    }

    /// The best candidate, if any is better than the start.
    pub(super) fn best(self) -> Option<Deltas> {
        self.best
    }
}
