//! No low rank: the most important rows or columns, and zeros.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::check;
use super::score::{RowScore, top};
use crate::error::{Error, Result};
use crate::model::{Factored, Structure};
use crate::stage::{Context, Decomposer, Moments, RankBudget, Stage};

/// Structured pruning: `W` with only its `rows` best rows. Parameters: `k n` for rows.
///
/// Source: the paper's `S` without its low-rank part. By [`RowScore::Energy`] no other
/// choice of rows has a smaller output error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SparseOnly {
    /// Rows or columns.
    pub structure: Structure,
    /// Which rows are the best.
    pub score: RowScore,
}

impl Stage for SparseOnly {
    fn name(&self) -> &str {
        "sparse"
    }
}

impl Decomposer for SparseOnly {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, moments, budget, self.structure)?;
        if budget.rank > 0 {
            return Err(Error::range("rank of sparse, which has no low rank", 0, budget.rank));
        }
        let scores = self.score.of(weight, self.structure, moments, cx)?;
        let kept = top(&scores, budget.rows);
        let exact = self.structure.pick(weight, &kept);
        Factored::sparse(weight.dim(), self.structure, kept, exact)
    }

    fn uses_moments(&self) -> bool {
        self.score == RowScore::Energy
    }
}
