//! Progress, for whoever wants to watch.

use super::report::{LayerReport, Report};
use crate::model::LayerId;

/// What is being done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The text runs through a layer, a dense one too.
    Calibrate,
    /// First pass: statistics, similarity, layer-wide alignment.
    Measure,
    /// Between them, for a size budget: merged once to see the spectra of its matrices.
    Budget,
    /// Second pass: alignment inside groups, merge, router.
    Merge,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Calibrate => "calibrate",
            Self::Measure => "measure",
            Self::Budget => "budget",
            Self::Merge => "merge",
        })
    }
}

/// Watches a run. Every method does nothing unless overridden; all are called from the thread that
/// runs the pipeline, in order.
pub trait Observer: Send + Sync {
    /// A phase of layer `done + 1` of `total` begins.
    fn layer_started(&self, _layer: LayerId, _phase: Phase, _done: usize, _total: usize) {}

    /// A layer was merged and handed on to be written, where there is a target.
    fn layer_finished(&self, _layer: &LayerReport) {}

    /// The run is over.
    fn finished(&self, _report: &Report) {}
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// The layer that a run is at.
#[derive(Clone, Copy)]
pub(crate) struct LayerProgress<'a> {
    pub(crate) observer: &'a dyn Observer,
    pub(crate) layer: LayerId,
    /// Layers before it.
    pub(crate) done: usize,
    /// Layers in all.
    pub(crate) total: usize,
}

impl LayerProgress<'_> {
    /// Announces a phase.
    pub(crate) fn started(&self, phase: Phase) {
        self.observer.layer_started(self.layer, phase, self.done, self.total);
    }
}
