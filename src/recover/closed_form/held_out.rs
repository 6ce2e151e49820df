//! The choice among the candidates of a least-squares fit by their error on held-out rows.

use ndarray::Array2;

use super::features::Features;
use super::normal_equations::Deltas;
use crate::error::Result;
use crate::model::MergedLayer;
use crate::recover::best_so_far::squares;
use crate::stage::{Context, Recovery};

/// The held_out_rows rows up to the down projections, which is all that the candidates differ in.
pub(super) struct HeldOutSelector {
    features: Features,
    /// Of the layer at the start.
    residual: Array2<f32>,
    /// `Σ ‖·‖²` of the residual of the best so far.
    least: f64,
    best: Option<Deltas>,
}

impl HeldOutSelector {
    /// With the held_out_rows rows of `task`.
    pub(super) fn of(task: &Recovery<'_>, start: &MergedLayer, cx: &Context) -> Result<Self> {
        let (features, residual) = Features::of_rows(task, task.held_out_rows(), start, cx)?;
        Ok(Self::new(features, residual))
    }

    /// With the features of some rows, and the residual of the start there.
    pub(super) fn new(features: Features, residual: Array2<f32>) -> Self {
        let least = squares(residual.view());
        Self { features, residual, least, best: None }
    }

    /// Takes a candidate if it is better than the start and all before; says whether it was. By
    /// more than what a forward pass rounds: it may not find the layer worse than the start.
    pub(super) fn consider(&mut self, deltas: Deltas, cx: &Context) -> Result<bool> {
        let error = self.features.remaining(&self.residual, &deltas, cx)?;
        let better = error < self.least * (1.0 - f64::from(f32::EPSILON).sqrt());
        if better {
            (self.least, self.best) = (error, Some(deltas));
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
