//! Recoverers one after the other.

use crate::error::Result;
use crate::model::MergedLayer;
use crate::stage::{Context, Needs, Recoverer, Recovery, Stage};

/// Runs recoverers in order, each on what the one before gave.
///
/// [`LeastSquares`](super::LeastSquares), [`Distill`](super::Distill) and least squares again is
/// the usual chain: the closed form is nearly free and a good start, gradients reach gate, up and
/// router, and the last fit takes what they leave to the down projections.
#[derive(Debug, Default)]
pub struct Sequence(pub Vec<Box<dyn Recoverer>>);

impl Stage for Sequence {
    fn name(&self) -> &str {
        "sequence"
    }

    fn needs(&self) -> Needs {
        self.0.iter().fold(Needs::NONE, |needs, recoverer| needs | recoverer.needs())
    }
}

impl Recoverer for Sequence {
    fn recover(
        &self,
        task: &Recovery<'_>,
        merged: MergedLayer,
        cx: &Context,
    ) -> Result<MergedLayer> {
        self.0.iter().try_fold(merged, |layer, recoverer| recoverer.recover(task, layer, cx))
    }
}
