//! The paper's importance of rows: sensitivity to the loss, smoothed over training steps, and the
//! schedule by which rows are removed.
//!
//! Gradients come from outside (this crate trains no language model). The names are those of
//! LoSparse's code, which calls the criterion PLATON with its uncertainty switched off.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Finite;

/// `Ī_t = β₁ Ī_{t−1} + (1 − β₁) I_{t−1}` with `I_t = |S ⊙ ∇S|`, for one matrix `S: (m, n)`.
///
/// The average takes in the sensitivity of the step *before*, as the published code does: the
/// scores of the first step are 0 and every score lags by one step. `Ī` and the mean over a row
/// are in `f64`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    beta: f64,
    average: Array2<f64>,
    last: Array2<f64>,
}

impl Sensitivity {
    /// The paper's `β₁`.
    pub const BETA: f64 = 0.85;

    /// Nothing seen yet of an `(m, n)` matrix.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a `beta` outside `[0, 1)`.
    pub fn new(shape: (usize, usize), beta: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::range("smoothing of sensitivities", "a number in [0, 1)", beta));
        }
        Ok(Self { beta, average: Array2::zeros(shape), last: Array2::zeros(shape) })
    }

    /// One step: `S` and its gradient, as they are before the step's pruning.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) for another shape,
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity.
    pub fn observe(
        &mut self,
        sparse: ArrayView2<'_, f32>,
        gradient: ArrayView2<'_, f32>,
    ) -> Result<()> {
        for part in [&sparse, &gradient] {
            if part.dim() != self.last.dim() {
                return Err(Error::shape("sensitivity", self.last.dim(), part.dim()));
            }
        }
        sparse.check_finite("sparse part")?;
        gradient.check_finite("gradient of the sparse part")?;
        let beta = self.beta;
        self.average.zip_mut_with(&self.last, |a, &i| *a = beta * *a + (1.0 - beta) * i);
        ndarray::Zip::from(&mut self.last)
            .and(sparse)
            .and(gradient)
            .for_each(|i, &s, &g| *i = (f64::from(s) * f64::from(g)).abs());
        Ok(())
    }

    /// Mean of `Ī` over each row: `(m)`.
    pub fn row_scores(&self) -> Vec<f64> {
        let n = self.average.ncols().max(1) as f64;
        self.average.rows().into_iter().map(|row| row.sum() / n).collect()
    }
}

/// The share of `S` that is kept at each step.
///
/// 1 up to step `t_i`; then `q_f + (1 − q_f) (1 − (t − t_i)/(T − t_i − t_f))³`; `q_f` after
/// `T − t_f`. Source: LoSparse's `schedule_threshold_comb`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CubicSchedule {
    /// `q_f`: the share that is kept in the end.
    pub final_share: f64,
    /// `t_i`: the last step without pruning.
    pub start: u64,
    /// `t_f`: steps at the end with the final share.
    pub hold: u64,
    /// `T`: number of steps.
    pub steps: u64,
}

impl CubicSchedule {
    /// The share kept at step `t`, counted from 0.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a final share outside `(0, 1]`.
    pub fn share(&self, t: u64) -> Result<f64> {
        let last = self.final_share;
        if !(last > 0.0 && last <= 1.0) {
            return Err(Error::range("final share", "a number in (0, 1]", last));
        }
        let end = self.steps.saturating_sub(self.hold);
        if t <= self.start {
            return Ok(1.0);
        }
        if t > end || end <= self.start {
            return Ok(last);
        }
        let progress = (t - self.start) as f64 / (end - self.start) as f64;
        Ok(last + (1.0 - last) * (1.0 - progress).powi(3))
    }
}

/// Row scores of one matrix, and how many numbers a row holds.
#[derive(Debug, Clone, Copy)]
pub struct ScoredRows<'a> {
    /// One score a row.
    pub scores: &'a [f64],
    /// Numbers in a row: it counts for so many in the share.
    pub width: usize,
}

/// Which rows of each matrix survive one threshold `τ` over the numbers of all matrices, of which
/// the share `q` is kept: `τ` is the `⌊N (1 − q)⌋`-th smallest of `N` scores, each row counted
/// once for every number in it, and rows with a score of `τ` or more survive. Ties survive, so
/// slightly more than the share may be left. Also returns `τ`; `None` when nothing is removed.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a share outside `(0, 1]`,
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a score that is not finite.
pub fn surviving_rows(
    matrices: &[ScoredRows<'_>],
    share: f64,
) -> Result<(Vec<Vec<u32>>, Option<f64>)> {
    if !(share > 0.0 && share <= 1.0) {
        return Err(Error::range("share of kept numbers", "a number in (0, 1]", share));
    }
    let mut weighed: Vec<(f64, usize)> = Vec::new();
    for matrix in matrices {
        matrix.scores.check_finite("row scores")?;
        weighed.extend(matrix.scores.iter().map(|&s| (s, matrix.width)));
    }
    let total: usize = weighed.iter().map(|(_, width)| width).sum();
    let removed = (total as f64 * (1.0 - share)) as usize;
    weighed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut seen = 0;
    let threshold = weighed.iter().find(|(_, width)| {
        seen += width;
        removed > 0 && seen >= removed
    });
    let threshold = threshold.map(|(score, _)| *score);
    let survives = |score: f64| threshold.is_none_or(|t| score >= t);
    let of_matrix = |m: &ScoredRows<'_>| {
        (0u32..).zip(m.scores).filter(|(_, s)| survives(**s)).map(|(i, _)| i).collect()
    };
    Ok((matrices.iter().map(of_matrix).collect(), threshold))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_schedule_passes_through_the_published_points() {
        let q = CubicSchedule { final_share: 0.1, start: 10, hold: 40, steps: 200 };
        let points = [(0, 1.0), (10, 1.0), (11, 0.98212), (50, 0.454_933), (100, 0.1576)];
        for (t, share) in points.into_iter().chain([(150, 0.100_267), (161, 0.1), (199, 0.1)]) {
            approx::assert_abs_diff_eq!(q.share(t).unwrap(), share, epsilon = 1e-5);
        }
        assert_eq!(CubicSchedule { steps: 20, ..q }.share(11).unwrap(), 0.1);
        for bad in [0.0, 1.5, f64::NAN] {
            assert!(CubicSchedule { final_share: bad, ..q }.share(50).is_err());
        }
    }

    #[test]
    fn scores_lag_one_step() {
        let (s, g) = (array![[1.0, -2.0], [0.5, 0.0]], array![[2.0, 1.0], [4.0, 9.0]]);
        let mut sensitivity = Sensitivity::new((2, 2), 0.85).unwrap();
        sensitivity.observe(s.view(), g.view()).unwrap();
        assert_eq!(sensitivity.row_scores(), [0.0, 0.0]);
        sensitivity.observe(s.view(), g.view()).unwrap();
        approx::assert_abs_diff_eq!(sensitivity.row_scores()[..], [0.3, 0.15], epsilon = 1e-12);
        assert!(sensitivity.observe(s.view(), array![[1.0]].view()).is_err());
        assert!(sensitivity.observe(s.view(), (&g * f32::NAN).view()).is_err());
        assert!(Sensitivity::new((1, 1), 1.0).is_err());
    }

    #[test]
    fn rows_compete_over_matrices_by_their_width() {
        let a = ScoredRows { scores: &[1.0, 4.0], width: 3 };
        let b = ScoredRows { scores: &[2.0, 3.0, 3.0], width: 1 };
        // Nine numbers: 1 1 1 2 3 3 4 4 4.
        let of = |share| surviving_rows(&[a, b], share).unwrap();
        assert_eq!(of(1.0), (vec![vec![0, 1], vec![0, 1, 2]], None));
        assert_eq!(of(0.5), (vec![vec![1], vec![0, 1, 2]], Some(2.0)));
        assert_eq!(of(0.4), (vec![vec![1], vec![1, 2]], Some(3.0)));
        assert!(surviving_rows(&[a], 0.0).is_err());
        assert!(surviving_rows(&[ScoredRows { scores: &[f64::NAN], width: 1 }], 0.5).is_err());
    }
}
