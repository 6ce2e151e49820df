//! The best of the layers that a recoverer has made.

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::model::MergedLayer;
use crate::stage::{Context, Recovery};

/// The best layer so far on the held-out rows; none as long as nothing is better than the start.
pub(in crate::recover) struct BestSoFar<'a> {
    task: Recovery<'a>,
    error: f64,
    layer: Option<MergedLayer>,
}

impl<'a> BestSoFar<'a> {
    pub(in crate::recover) fn new(
        task: &Recovery<'a>,
        start: &MergedLayer,
        cx: &Context,
    ) -> Result<Self> {
        Ok(Self { task: *task, error: task.error(start, cx)?, layer: None })
    }

    /// Takes a layer if it is better; says whether it was.
    pub(in crate::recover) fn consider(
        &mut self,
        layer: MergedLayer,
        cx: &Context,
    ) -> Result<bool> {
        let error = self.task.error(&layer, cx)?;
        let better = error < self.error;
        if better {
            (self.error, self.layer) = (error, Some(layer));
        }
        Ok(better)
    }

    /// The best layer, or the start.
    pub(in crate::recover) fn or(self, start: MergedLayer) -> MergedLayer {
        self.layer.unwrap_or(start)
    }
}

/// Ridges to choose from, the largest first; refuses what gives no positive definite system.
pub(in crate::recover) fn descending(ridges: &[f64]) -> Result<Vec<f64>> {
    if ridges.is_empty() {
        return Err(Error::range("ridges of a least-squares fit", "at least one", 0));
    }
    if let Some(bad) = ridges.iter().find(|r| !r.is_finite() || **r <= 0.0) {
        return Err(Error::range("ridge of a least-squares fit", "above 0", bad));
    }
    let mut ridges = ridges.to_vec();
    ridges.sort_by(|a, b| b.total_cmp(a));
    Ok(ridges)
}

/// `Σ x²`.
pub(in crate::recover) fn squares(x: ArrayView2<'_, f32>) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}
