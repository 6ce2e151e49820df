//! Fewer tokens to fit, all held-out ones.

use ndarray::{Array2, ArrayView2, Axis};

use crate::stage::Recovery;

/// At most `most` of `n` indices, evenly apart, from 0.
pub(super) fn evenly(n: usize, most: usize) -> Vec<usize> {
    let chosen = n.min(most);
    (0..chosen).map(|i| i * n / chosen).collect()
}

/// ExpertFeatures of a task, copied.
pub(super) struct Subsampled {
    inputs: Array2<f32>,
    targets: Array2<f32>,
    narrowed: bool,
    held_out: usize,
}

impl Subsampled {
    /// At most `most` of the rows that may be fitted, evenly apart, and the held-out rows.
    pub(super) fn of(task: &Recovery<'_>, most: usize) -> Self {
        let mut rows = evenly(task.fitted(), most);
        rows.extend(task.fitted()..task.inputs.nrows());
        let of = |all: ArrayView2<'_, f32>| all.select(Axis(0), &rows);
        let (inputs, targets) = (of(task.inputs), of(task.targets));
        Self { inputs, targets, narrowed: task.narrowed, held_out: task.held_out }
    }

    pub(super) fn task(&self) -> Recovery<'_> {
        let Self { inputs, targets, narrowed, held_out } = self;
        Recovery {
            inputs: inputs.view(),
            targets: targets.view(),
            narrowed: *narrowed,
            held_out: *held_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_evenly_apart_and_held_out_ones_stay() {
        let all = Array2::from_shape_fn((9, 1), |(i, _)| i as f32);
        let of = |held_out, most| {
            let (inputs, targets) = (all.view(), all.view());
            let subsampled =
                Subsampled::of(&Recovery { inputs, targets, narrowed: true, held_out }, most);
            let task = subsampled.task();
            assert_eq!((task.targets, task.held_out, task.narrowed), (task.inputs, held_out, true));
            task.inputs.iter().copied().collect::<Vec<_>>()
        };
        assert_eq!(of(2, 3), [0.0, 2.0, 4.0, 7.0, 8.0]);
        assert_eq!(of(0, 3), [0.0, 3.0, 6.0]);
        assert_eq!(of(8, 3).len(), 9);
        assert_eq!(of(9, 3).len(), 9);
    }
}
