//! The task of a recoverer: inputs, target outputs, held-out rows.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use super::context::Context;
use crate::error::{Error, Result};
use crate::model::{Finite, MergedLayer};

/// The task of a recoverer: the original layer's output on calibration tokens, which the merged
/// layer is fitted to.
#[derive(Debug, Clone, Copy)]
pub struct Recovery<'a> {
    /// `(t, d_model)` what the merged layer will get.
    pub inputs: ArrayView2<'a, f32>,
    /// `(t, d_model)` what the original layer's routed experts gave; shared experts excluded.
    pub targets: ArrayView2<'a, f32>,
    /// Which router is used: the narrowed one (stock exports), if there is one, or the `n`-row one
    /// with the expert map (native exports).
    pub narrowed: bool,
    /// How many rows at the end no fit may see: they measure it. They should be like the others:
    /// of calibration files in order the last would measure fits to the first ones.
    pub held_out: usize,
}

impl Recovery<'_> {
    /// Checks that inputs, targets and layer fit each other and are finite.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape),
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite), or
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for more held-out rows than rows.
    pub fn check(&self, merged: &MergedLayer) -> Result<()> {
        let (t, d) = (self.inputs.nrows(), merged.router.weight().ncols());
        for found in [self.inputs.dim(), self.targets.dim()] {
            if found != (t, d) {
                return Err(Error::shape("recovery inputs and targets", (t, d), found));
            }
        }
        if self.held_out > t {
            return Err(Error::range("held-out rows", format!("at most {t}"), self.held_out));
        }
        self.inputs.check_finite("recovery inputs")?;
        self.targets.check_finite("recovery targets")
    }

    /// The number of rows, from the first, that may be fitted.
    pub fn fitted(&self) -> usize {
        self.inputs.nrows().saturating_sub(self.held_out)
    }

    /// The rows that measure a fit: the held-out ones; without any, all.
    pub fn held_out_rows(&self) -> Range<usize> {
        let first = if self.held_out == 0 { 0 } else { self.fitted() };
        first..self.inputs.nrows()
    }

    /// What the merged layer gives for `rows`: `(rows, d_model)`.
    ///
    /// # Errors
    /// Those of the layer's own output.
    pub fn output(
        &self,
        merged: &MergedLayer,
        rows: Range<usize>,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let x = self.inputs.slice(s![rows, ..]);
        let narrowed = if self.narrowed { merged.narrowed_output(x, cx.compute())? } else { None };
        narrowed.map_or_else(|| merged.mapped_output(x, cx.compute()), Ok)
    }

    /// Relative output error on the held-out rows, `Σ ‖y − t‖² / Σ ‖t‖²`: 0 is perfect, 1 is as
    /// good as no output. Targets that are all 0 count as of unit energy.
    ///
    /// # Errors
    /// Those of [`Recovery::output`].
    pub fn error(&self, merged: &MergedLayer, cx: &Context) -> Result<f64> {
        let rows = self.held_out_rows();
        let output = self.output(merged, rows.clone(), cx)?;
        Ok(relative_error(output.view(), self.targets.slice(s![rows, ..])))
    }
}

/// `Σ (y − t)² / Σ t²`, in `f64`, in row order. Targets that are all 0 count as of unit energy, so
/// that an output that is not 0 has an error.
pub(crate) fn relative_error(output: ArrayView2<'_, f32>, targets: ArrayView2<'_, f32>) -> f64 {
    let (mut residual, mut energy) = (0.0, 0.0);
    for (&y, &t) in output.iter().zip(targets) {
        let (y, t) = (f64::from(y), f64::from(t));
        residual += (y - t) * (y - t);
        energy += t * t;
    }
    if energy > 0.0 { residual / energy } else { residual }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Expert, Grouping, LayerId, Router, RoutingRule};
    use ndarray::array;

    #[test]
    fn the_tail_is_held_out_and_misfits_are_refused() {
        // One expert that gives back what is positive, with weight 1.
        let expert = Expert::relu(Array2::eye(2), Array2::eye(2)).unwrap();
        let router = Router::new(array![[1.0, 0.0]], None, None, RoutingRule::softmax(1, false));
        let (id, grouping) = (LayerId::causal(0), Grouping::identity(1));
        let merged = MergedLayer::new(id, vec![expert], grouping, router.unwrap(), None).unwrap();
        let inputs = array![[1.0, 2.0], [3.0, 4.0]];
        let targets = array![[9.0, 9.0], [3.0, 2.0]];
        let of = |held_out| Recovery {
            inputs: inputs.view(),
            targets: targets.view(),
            narrowed: true,
            held_out,
        };
        let cx = Context::cpu(0);
        assert_eq!(of(1).error(&merged, &cx).unwrap(), 4.0 / 13.0);
        assert_eq!(of(0).error(&merged, &cx).unwrap(), (64.0 + 49.0 + 4.0) / (162.0 + 13.0));
        let zero = Array2::zeros((1, 2));
        assert_eq!(relative_error(targets.slice(s![1.., ..]), zero.view()), 13.0);
        assert_eq!(relative_error(zero.view(), zero.view()), 0.0);
        assert!(of(2).check(&merged).is_ok() && of(3).check(&merged).is_err());
        let narrow = targets.slice(s![.., ..1]);
        assert!(Recovery { targets: narrow, ..of(0) }.check(&merged).is_err());
    }
}
