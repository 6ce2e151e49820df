//! Inputs of a decomposition besides the weights: second moments, and a budget.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::linalg::Compute;
use crate::model::{Finite, Structure};

/// Second moments `Σ x xᵀ: (n, n)` of the inputs of a projection, summed over tokens in `f64`.
///
/// With them the error of an approximation is measured where it matters: for
/// `C = Σ x xᵀ / tokens`, `tr(E C Eᵀ)` is the mean of `‖E x‖²` over the tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    sum: Array2<f64>,
    tokens: u64,
}

impl Moments {
    /// Sums that were made elsewhere; made symmetric from their lower triangle.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] unless `sum` is square; [`ErrorKind::NotFinite`] for a NaN or infinity;
    /// [`ErrorKind::OutOfRange`] for a negative diagonal entry, or without tokens.
    pub fn new(mut sum: Array2<f64>, tokens: u64) -> Result<Self> {
        let n = sum.nrows();
        if sum.dim() != (n, n) {
            return Err(Error::shape("second moments", (n, n), sum.dim()));
        }
        let (values, _) = sum.as_standard_layout().into_owned().into_raw_vec_and_offset();
        values[..].check_finite("second moments")?;
        if let Some(negative) = sum.diag().iter().find(|x| **x < 0.0) {
            return Err(Error::range("second moment of a feature", "0 or more", negative));
        }
        if tokens == 0 {
            return Err(Error::range("tokens behind second moments", "1 or more", 0));
        }
        for i in 0..n {
            for j in 0..i {
                sum[[j, i]] = sum[[i, j]];
            }
        }
        Ok(Self { sum, tokens })
    }

    /// The moments of the rows of `X: (t, n)`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFinite`] for a NaN or infinity; [`ErrorKind::OutOfRange`] without rows.
    pub fn of(x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Self> {
        let mut sum = Array2::zeros((x.ncols(), x.ncols()));
        compute.add_gram(x, &mut sum)?;
        Self::new(sum, x.nrows() as u64)
    }

    /// Adds moments of further tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the widths differ.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        if other.sum.dim() != self.sum.dim() {
            return Err(Error::shape("second moments", self.sum.dim(), other.sum.dim()));
        }
        self.sum += &other.sum;
        self.tokens += other.tokens;
        Ok(())
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.sum.nrows()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `C = Σ x xᵀ / tokens: (n, n)`.
    pub fn mean(&self) -> Array2<f64> {
        &self.sum / self.tokens as f64
    }

    /// Root mean square of every feature: `(n)`.
    pub fn rms(&self) -> Vec<f64> {
        self.sum.diag().iter().map(|x| (x / self.tokens as f64).sqrt()).collect()
    }

    /// Fails unless there are `n` features.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`].
    pub fn check_width(&self, n: usize) -> Result<()> {
        match self.width() == n {
            true => Ok(()),
            false => Err(Error::shape("second moments", (n, n), self.sum.dim())),
        }
    }
}

/// How much of a matrix `(m, n)` is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankBudget {
    /// Rank of the low-rank part; 0 for none.
    pub rank: usize,
    /// Dense rows of the sparse part, or columns where the method is structured by columns; 0 for
    /// none.
    pub rows: usize,
}

impl RankBudget {
    /// Low rank only.
    pub const fn rank(rank: usize) -> Self {
        Self { rank, rows: 0 }
    }

    /// The same with a share of `available` rows (or columns) kept, rounded up.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a share outside `(0, 1]`.
    pub fn with_share(self, available: usize, share: f64) -> Result<Self> {
        if !(share > 0.0 && share <= 1.0) {
            return Err(Error::range("share of kept rows", "a number in (0, 1]", share));
        }
        // A product such as 0.1 · 30 lies a rounding error above the whole number.
        let rows = (share * available as f64 - 1e-9).ceil() as usize;
        Ok(Self { rows, ..self })
    }

    /// Numbers that a matrix of this budget stores: `r (m + n) + k n`, with `k m` for columns.
    pub const fn parameters(&self, (m, n): (usize, usize), structure: Structure) -> usize {
        let length = match structure {
            Structure::Rows => n,
            Structure::Columns => m,
        };
        self.rank * (m + n) + self.rows * length
    }

    /// Fails unless the budget fits an `(m, n)` matrix with `available` rows (or columns) to keep.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a rank above `min(m, n)`, more than `available` rows, or
    /// neither rank nor rows.
    pub fn check(&self, (m, n): (usize, usize), available: usize) -> Result<()> {
        if self.rank > m.min(n) {
            return Err(Error::range("rank", format!("at most {}", m.min(n)), self.rank));
        }
        if self.rows > available {
            return Err(Error::range("kept rows", format!("at most {available}"), self.rows));
        }
        if (self.rank, self.rows) == (0, 0) {
            let kind = ErrorKind::OutOfRange {
                what: "budget".into(),
                expected: "a rank or kept rows above 0".into(),
                found: "neither".into(),
            };
            return Err(kind.into());
        }
        Ok(())
    }
}

/// The stored form of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// All of it, as it is.
    Dense,
    /// `L R + S`.
    Factors {
        /// At most this rank, and this number of rows or columns.
        budget: RankBudget,
        /// Whether rows or columns.
        structure: Structure,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    #[test]
    fn moments_are_sums_over_tokens() {
        let x = array![[1.0, 2.0], [3.0, -1.0]];
        let mut moments = Moments::of(x.view(), &Cpu::new()).unwrap();
        assert_eq!(moments.mean(), array![[5.0, -0.5], [-0.5, 2.5]]);
        moments.add(&Moments::of(array![[1.0, 1.0]].view(), &Cpu::new()).unwrap()).unwrap();
        assert_eq!((moments.tokens(), moments.width()), (3, 2));
        assert_eq!(moments.rms(), [(11.0f64 / 3.0).sqrt(), (6.0f64 / 3.0).sqrt()]);
        assert!(moments.add(&Moments::new(Array2::eye(3), 1).unwrap()).is_err());
        assert!(moments.check_width(3).is_err());
    }

    #[test]
    fn bad_moments_are_refused() {
        assert!(Moments::new(Array2::eye(2), 0).is_err());
        assert!(Moments::new(Array2::zeros((2, 3)), 1).is_err());
        assert!(Moments::new(array![[-1.0]], 1).is_err());
        let nan = Moments::new(array![[1.0, f64::NAN], [0.0, 1.0]], 1).unwrap_err();
        assert!(matches!(nan.kind(), ErrorKind::NotFinite { index: 1, .. }), "{nan}");
    }

    #[test]
    fn budgets_fit_or_say_why() {
        let budget = RankBudget::rank(2).with_share(30, 0.1).unwrap();
        assert_eq!(budget, RankBudget { rank: 2, rows: 3 });
        assert_eq!(RankBudget::rank(1).with_share(7, 1.0).unwrap().rows, 7);
        assert!(budget.check((30, 4), 30).is_ok());
        assert!(RankBudget::rank(5).check((30, 4), 30).is_err());
        assert!(budget.check((30, 4), 2).is_err());
        assert!(RankBudget::rank(0).check((3, 3), 3).unwrap_err().to_string().contains("neither"));
        for share in [0.0, -0.5, 1.5, f64::NAN] {
            assert!(budget.with_share(10, share).is_err());
        }
    }
}
