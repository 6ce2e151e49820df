//! Inputs and outputs of a layer on a text, and which of their rows are held out of every fit.
//!
//! Held-out rows must be independent of what is fitted: tokens of one window are so alike that a
//! fit to some of them looks good on the others at any ridge. So whole windows are held out.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, CowArray, Ix2, concatenate, s};

use crate::error::{Error, Result};
use crate::stage::Recovery;

/// Runs of consecutive rows that stand for windows where there are none.
const RUNS: usize = 40;

/// What a layer gets and gave, batch by batch of windows.
#[derive(Default)]
pub(crate) struct LayerSamples {
    /// `(t, d_model)` a batch.
    pub(crate) inputs: Vec<Array2<f32>>,
    /// `(t, d_model)` a batch.
    pub(crate) targets: Vec<Array2<f32>>,
    /// The rows of each window, in its batch.
    pub(crate) windows: Vec<Vec<Range<usize>>>,
}

/// Rows that a layer is fitted to and judged by: `(t, d_model)` inputs and targets, the held-out
/// rows behind the others.
pub(crate) struct FitRows<'a> {
    inputs: CowArray<'a, f32, Ix2>,
    targets: Array2<f32>,
    held_out: usize,
}

impl<'a> FitRows<'a> {
    /// Rows of samples in the order of a text, none of them held out: nothing is fitted to them.
    pub(crate) fn unfitted(inputs: ArrayView2<'a, f32>, targets: Array2<f32>) -> Self {
        Self { inputs: inputs.into(), targets, held_out: 0 }
    }

    /// What a recoverer works towards; `narrowed` where the narrowed router chooses.
    pub(crate) fn task(&self, narrowed: bool) -> Recovery<'_> {
        let (inputs, targets) = (self.inputs.view(), self.targets.view());
        Recovery { inputs, targets, narrowed, held_out: self.held_out }
    }
}

impl LayerSamples {
    /// Adds some windows of a batch: ranges of its rows, ascending.
    pub(crate) fn push(
        &mut self,
        inputs: ArrayView2<'_, f32>,
        targets: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
    ) -> Result<()> {
        let pick = |from: ArrayView2<'_, f32>| {
            let rows = windows.iter().map(|rows| from.slice_move(s![rows.clone(), ..]));
            joined(&rows.collect::<Vec<_>>())
        };
        self.inputs.push(pick(inputs)?);
        self.targets.push(pick(targets)?);
        let mut end = 0;
        let moved = windows.iter().map(|rows| {
            end += rows.len();
            end - rows.len()..end
        });
        self.windows.push(moved.collect());
        Ok(())
    }

    /// The rows of all batches, with those of some windows held out.
    pub(crate) fn split<'a>(&self) -> Result<FitRows<'a>> {
        let inputs: Vec<_> = self.inputs.iter().map(|rows| rows.view()).collect();
        let targets: Vec<_> = self.targets.iter().map(|rows| rows.view()).collect();
        split(&inputs, &targets, &self.windows)
    }
}

/// Every tenth window moved behind the others, or the last of fewer. Less than two windows are cut
/// into runs of rows.
///
/// Not more: half as many tokens again to fit are worth more than a surer choice of a ridge. At
/// 8,192 tokens, `fast`, a quarter that was held out left Mixtral at 4.028 nats, one window in 16
/// at 3.888.
pub(crate) fn split<'a>(
    inputs: &[ArrayView2<'_, f32>],
    targets: &[ArrayView2<'_, f32>],
    windows: &[Vec<Range<usize>>],
) -> Result<FitRows<'a>> {
    let batches = windows.iter().enumerate();
    let mut all: Vec<(usize, Range<usize>)> =
        batches.flat_map(|(b, windows)| windows.iter().map(move |w| (b, w.clone()))).collect();
    if all.len() < 2 {
        all = inputs.iter().enumerate().flat_map(|(b, x)| runs(b, x.nrows())).collect();
    }
    let every = every(all.len());
    let (mut order, mut last) = (Vec::new(), Vec::new());
    for (i, window) in all.into_iter().enumerate() {
        if i % every == every - 1 { last.push(window) } else { order.push(window) }
    }
    let held_out = last.iter().map(|(_, rows)| rows.len()).sum();
    order.append(&mut last);
    let pick = |from: &[ArrayView2<'_, f32>]| {
        let rows = order.iter().map(|(b, rows)| from[*b].slice(s![rows.clone(), ..]));
        joined(&rows.collect::<Vec<_>>())
    };
    Ok(FitRows { inputs: pick(inputs)?.into(), targets: pick(targets)?, held_out })
}

/// Rows of one width, one batch below the other.
pub(crate) fn joined(batches: &[ArrayView2<'_, f32>]) -> Result<Array2<f32>> {
    concatenate(Axis(0), batches)
        .map_err(|e| Error::shape("batches of one width", "the same width", e))
}

/// One in how many of `windows` is held out.
fn every(windows: usize) -> usize {
    windows.clamp(2, 10)
}

/// About [`RUNS`] runs of consecutive rows.
fn runs(batch: usize, rows: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let count = rows.min(RUNS);
    let at = move |i: usize| i * rows / count;
    (0..count).map(move |i| (batch, at(i)..at(i + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: usize) -> Array2<f32> {
        Array2::from_shape_fn((count, 1), |(i, _)| i as f32)
    }

    #[test]
    fn whole_windows_are_held_out() {
        let parts = vec![rows(100), rows(100)];
        let windows = vec![(0..20).map(|i| i * 5..i * 5 + 5).collect(); 2];
        let samples = LayerSamples { inputs: parts.clone(), targets: parts, windows };
        let FitRows { inputs, targets, held_out: held } = samples.split().unwrap();
        assert_eq!((inputs.nrows(), held), (200, 20));
        assert_eq!(inputs, targets);
        let last = [45.0, 46.0, 47.0, 48.0, 49.0, 95.0, 96.0, 97.0, 98.0, 99.0];
        assert_eq!(inputs.column(0).to_vec()[190..], last);
        assert_eq!(inputs.column(0).to_vec()[180..190], last);
    }

    #[test]
    fn few_windows_give_one_and_one_is_cut_into_runs() {
        let held = |lengths: &[usize]| {
            let mut start = 0;
            let windows = lengths.iter().map(|n| {
                start += n;
                start - n..start
            });
            let windows = vec![windows.collect::<Vec<_>>()];
            let all = rows(lengths.iter().sum());
            let samples = LayerSamples { inputs: vec![all.clone()], targets: vec![all], windows };
            samples.split().unwrap().held_out
        };
        assert_eq!(held(&[7, 3]), 3);
        assert_eq!(held(&[1, 2, 3]), 3);
        assert_eq!(held(&[2; 8]), 2);
        assert_eq!(held(&[2; 16]), 2);
        assert_eq!(held(&[2; 48]), 8);
        assert_eq!(held(&[400]), 40);
        assert_eq!(held(&[3]), 1);
        assert_eq!(held(&[1]), 0);
    }

    #[test]
    fn samples_are_cut_into_runs() {
        let all = rows(80);
        let rows = split(&[all.view()], &[all.view()], &[]).unwrap();
        let FitRows { inputs, held_out: held, .. } = rows;
        assert_eq!(held, 8);
        assert_eq!(
            inputs.column(0).to_vec()[72..],
            [18.0, 19.0, 38.0, 39.0, 58.0, 59.0, 78.0, 79.0]
        );
    }
}
