//! Which rows or columns are worth keeping.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::whitening::Whitening;
use crate::error::{Error, Result};
use crate::model::{Finite, Structure};
use crate::stage::{Context, Moments};

/// The score of a row `s_a` (or column) of the residual `S`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowScore {
    /// Mean of `|S|` along the row: the paper's, of its magnitude criterion.
    #[default]
    Magnitude,
    /// What the output loses without the row: `s_a C s_aᵀ` for rows, `‖s_a‖² C_aa` for columns,
    /// with `C` the inputs' second moment; the sum of squares without moments.
    Energy,
}

impl RowScore {
    /// The score of every row of `S: (m, n)`.
    ///
    /// # Errors
    /// Those of the whitening.
    pub(super) fn of(
        self,
        residual: ArrayView2<'_, f32>,
        structure: Structure,
        moments: Option<&Moments>,
        cx: &Context,
    ) -> Result<Vec<f64>> {
        match (self, moments) {
            (Self::Magnitude, _) => Ok(sums(residual, structure, |x| x.abs(), true)),
            (Self::Energy, None) => Ok(sums(residual, structure, |x| x * x, false)),
            (Self::Energy, Some(moments)) if structure == Structure::Columns => {
                let plain = sums(residual, structure, |x| x * x, false);
                Ok(plain.iter().zip(moments.rms()).map(|(s, rms)| s * rms * rms).collect())
            }
            (Self::Energy, Some(moments)) => {
                let white = Whitening::new(moments, 0.0, cx)?.apply(residual, cx)?;
                Ok(sums(white.view(), structure, |x| x * x, false))
            }
        }
    }
}

fn sums(a: ArrayView2<'_, f32>, by: Structure, f: fn(f64) -> f64, mean: bool) -> Vec<f64> {
    let sum = |row: ndarray::ArrayView1<'_, f32>| {
        let total: f64 = row.iter().map(|&x| f(f64::from(x))).sum();
        if mean { total / row.len().max(1) as f64 } else { total }
    };
    a.axis_iter(by.axis()).map(sum).collect()
}

/// Squared norms of the rows of a matrix.
pub(super) fn squares(a: ArrayView2<'_, f32>, by: Structure) -> Vec<f64> {
    sums(a, by, |x| x * x, false)
}

/// The `k` rows with the largest scores, ascending; ties go to the smaller index.
pub(super) fn top(scores: &[f64], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let score = |i: u32| scores[i as usize];
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// The rows that are not among `kept`, ascending.
pub(super) fn others(kept: &[u32], count: usize) -> Vec<usize> {
    (0..count).filter(|&i| kept.binary_search(&(i as u32)).is_err()).collect()
}

/// Scores handed in from outside, checked.
pub(super) fn check_scores(scores: &[f64], count: usize) -> Result<()> {
    if scores.len() != count {
        return Err(Error::shape("importance of rows or columns", count, scores.len()));
    }
    scores.check_finite("importance of rows or columns")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn scores_by_hand() {
        let s = array![[1.0, -3.0], [2.0, 0.0]];
        let moments = Moments::new(array![[4.0, 1.0], [1.0, 9.0]], 1).unwrap();
        let of = |score: RowScore, by, moments| {
            score.of(s.view(), by, moments, &Context::cpu(0)).unwrap()
        };
        let (rows, columns) = (Structure::Rows, Structure::Columns);
        assert_eq!(of(RowScore::Magnitude, rows, None), [2.0, 1.0]);
        assert_eq!(of(RowScore::Magnitude, columns, Some(&moments)), [1.5, 1.5]);
        assert_eq!(of(RowScore::Energy, rows, None), [10.0, 4.0]);
        // (1, −3) C (1, −3)ᵀ = 4 − 6 + 81.
        let weighed = of(RowScore::Energy, rows, Some(&moments));
        approx::assert_abs_diff_eq!(weighed[..], [79.0, 16.0], epsilon = 1e-4);
        let weighed = of(RowScore::Energy, columns, Some(&moments));
        approx::assert_abs_diff_eq!(weighed[..], [20.0, 81.0], epsilon = 1e-9);
    }

    #[test]
    fn the_top_is_ascending_and_ties_go_to_the_smaller_index() {
        assert_eq!(top(&[1.0, 5.0, 5.0, 5.0, 0.0], 2), [1, 2]);
        assert_eq!(top(&[1.0, 5.0, 7.0], 3), [0, 1, 2]);
        assert_eq!(others(&[1, 3], 5), [0, 2, 4]);
        assert!(check_scores(&[1.0], 2).is_err() && check_scores(&[f64::NAN], 1).is_err());
    }
}
