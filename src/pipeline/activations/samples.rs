//! What a layer gets and gave, and which of it judges the fits to the rest.
//!
//! Judges must be strangers to what is fitted: tokens of one window are so alike that a fit to some
//! of them looks good on the others at any ridge. So whole windows judge.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use crate::error::{Error, Result};

/// Runs of consecutive rows that stand for windows where there are none.
const RUNS: usize = 40;

/// What a layer gets and gave, batch by batch of windows.
#[derive(Default)]
pub(crate) struct Seen {
    /// `(t, d_model)` a batch.
    pub(crate) inputs: Vec<Array2<f32>>,
    /// `(t, d_model)` a batch.
    pub(crate) targets: Vec<Array2<f32>>,
    /// The rows of each window, in its batch.
    pub(crate) windows: Vec<Vec<Range<usize>>>,
}

/// Inputs and targets, the rows that judge behind the others, and how many they are.
pub(crate) type Split = (Array2<f32>, Array2<f32>, usize);

impl Seen {
    /// Of samples of a text, in its order.
    pub(crate) fn samples(inputs: Array2<f32>, targets: Array2<f32>) -> Self {
        Self { inputs: vec![inputs], targets: vec![targets], windows: Vec::new() }
    }

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

    /// Every tenth window moved behind the others, or the last of fewer. Less than two windows are
    /// cut into runs of rows.
    ///
    /// Not more: half as many tokens again to fit are worth more than a surer choice of a ridge. At
    /// 8,192 tokens, `fast`, a quarter that judged left Mixtral at 4.028 nats, one window in 16 at
    /// 3.888.
    pub(crate) fn split(&self) -> Result<Split> {
        let batches = self.windows.iter().enumerate();
        let mut all: Vec<(usize, Range<usize>)> =
            batches.flat_map(|(b, windows)| windows.iter().map(move |w| (b, w.clone()))).collect();
        if all.len() < 2 {
            all = self.inputs.iter().enumerate().flat_map(|(b, x)| runs(b, x.nrows())).collect();
        }
        let every = every(all.len());
        let (mut order, mut judging) = (Vec::new(), Vec::new());
        for (i, window) in all.into_iter().enumerate() {
            if i % every == every - 1 { judging.push(window) } else { order.push(window) }
        }
        let held = judging.iter().map(|(_, rows)| rows.len()).sum();
        order.append(&mut judging);
        let pick = |from: &[Array2<f32>]| {
            let rows = order.iter().map(|(b, rows)| from[*b].slice(s![rows.clone(), ..]));
            joined(&rows.collect::<Vec<_>>())
        };
        Ok((pick(&self.inputs)?, pick(&self.targets)?, held))
    }
}

/// Rows of one width, one batch below the other.
pub(crate) fn joined(batches: &[ArrayView2<'_, f32>]) -> Result<Array2<f32>> {
    concatenate(Axis(0), batches)
        .map_err(|e| Error::shape("batches of one width", "the same width", e))
}

/// One in how many of `windows` judges.
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
    fn whole_windows_judge() {
        let parts = vec![rows(100), rows(100)];
        let windows = vec![(0..20).map(|i| i * 5..i * 5 + 5).collect(); 2];
        let seen = Seen { inputs: parts.clone(), targets: parts, windows };
        let (inputs, targets, held) = seen.split().unwrap();
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
            Seen { inputs: vec![all.clone()], targets: vec![all], windows }.split().unwrap().2
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
        let seen = Seen::samples(rows(80), rows(80));
        let (inputs, _, held) = seen.split().unwrap();
        assert_eq!(held, 8);
        assert_eq!(
            inputs.column(0).to_vec()[72..],
            [18.0, 19.0, 38.0, 39.0, 58.0, 59.0, 78.0, 79.0]
        );
    }
}
