//! What a compression may keep of matrices.

use crate::error::Result;
use crate::model::Structure;
use crate::stage::{RankBudget, SizeBudget};

/// What is kept of every matrix `(m, n)` of every merged expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixBudget {
    /// Rank of the low-rank part; 0 for none.
    pub rank: usize,
    /// Share of the `m` rows that stay dense, in (0, 1], rounded up to whole rows; `None` for none.
    /// Of the `n` columns where the structure says so.
    pub rows: Option<f64>,
    /// Whether rows or columns stay dense; that of the decomposer.
    pub structure: Structure,
}

impl MatrixBudget {
    /// Rank and number of rows for one matrix.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a share outside (0, 1], a rank
    /// above `min(m, n)`, or neither.
    pub fn of(&self, dim: (usize, usize)) -> Result<RankBudget> {
        let count = self.structure.count(dim);
        let mut budget = RankBudget::rank(self.rank);
        if let Some(share) = self.rows {
            budget = budget.with_share(count, share)?;
        }
        budget.check(dim, count)?;
        Ok(budget)
    }
}

/// What compression may keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CompressionBudget {
    /// The same of every matrix.
    Matrix(MatrixBudget),
    /// As much of each matrix as pays most for all of them together.
    Size(SizeBudget),
}

impl From<MatrixBudget> for CompressionBudget {
    fn from(budget: MatrixBudget) -> Self {
        Self::Matrix(budget)
    }
}

impl From<SizeBudget> for CompressionBudget {
    fn from(budget: SizeBudget) -> Self {
        Self::Size(budget)
    }
}
