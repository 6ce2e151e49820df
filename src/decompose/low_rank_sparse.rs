//! Low rank plus structured sparse, as in the paper.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::check;
use super::score::{RowScore, check_scores, top};
use crate::error::{Error, Result};
use crate::linalg::SvdMethod;
use crate::model::{Factored, Finite, Structure};
use crate::stage::{Context, Decomposer, Moments, RankBudget, Stage};

/// `W ≈ L R + S`: the low-rank part is the truncated SVD of all of `W`, `S` the `rows` rows of
/// `W − L R` with the largest score, so that those rows are exact. Parameters: `r (m + n) + k n`.
///
/// Source: the paper and LoSparse (arXiv 2306.11222), at the initialisation
/// `L = U_r Σ_r^½`, `R = Σ_r^½ V_rᵀ`. Their importance comes from gradients over fine-tuning:
/// [`LowRankSparse::with_importance`] takes it, [`platon`](super::platon) computes it. Without
/// gradients the score is their magnitude criterion, mean `|S|` of the row.
///
/// Deviation: every matrix keeps its own number of rows. Theirs compete over all matrices for one
/// threshold; [`platon::surviving_rows`](super::platon::surviving_rows) does that.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowRankSparse {
    /// Rows (the paper) or columns.
    pub structure: Structure,
    /// Which rows are kept.
    pub score: RowScore,
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl LowRankSparse {
    /// `L`, `R` and the dense residual `S = W − L R` of `W: (m, n)`: the state in which the paper
    /// begins to prune.
    ///
    /// # Errors
    /// Those of [`Context::truncated_svd`].
    pub fn split(
        &self,
        weight: ArrayView2<'_, f32>,
        rank: usize,
        cx: &Context,
    ) -> Result<(Array2<f32>, Array2<f32>, Array2<f32>)> {
        let svd = cx.truncated_svd(weight, rank, self.svd)?;
        let (left, right) = svd.into_balanced();
        let mut residual = weight.to_owned();
        if rank > 0 {
            cx.compute().gemm(-1.0, left.view(), right.view(), 1.0, residual.view_mut())?;
        }
        Ok((left, right, residual))
    }

    /// The decomposition that keeps the rows with the largest `importance`, one value a row.
    ///
    /// # Errors
    /// As [`Decomposer::decompose`]; [`ErrorKind::Shape`](crate::ErrorKind::Shape) or
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for an importance that does not fit.
    pub fn with_importance(
        &self,
        weight: ArrayView2<'_, f32>,
        importance: &[f64],
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, None, budget, self.structure)?;
        check_scores(importance, self.structure.count(weight.dim()))?;
        let (left, right, residual) = self.split(weight, budget.rank, cx)?;
        self.keep(left, right, &residual, top(importance, budget.rows))
    }

    /// The decomposition that keeps the rows of largest mean `|S ⊙ ∇S|`: what the loss would
    /// lose without them, to first order. `gradient` is `∇W = ∇S` of the loss, `(m, n)`. Over
    /// several steps of training [`Sensitivity`](super::platon::Sensitivity) smooths these scores.
    ///
    /// # Errors
    /// As [`Decomposer::decompose`]; [`ErrorKind::Shape`](crate::ErrorKind::Shape) or
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a gradient that does not fit.
    pub fn by_sensitivity(
        &self,
        weight: ArrayView2<'_, f32>,
        gradient: ArrayView2<'_, f32>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, None, budget, self.structure)?;
        if gradient.dim() != weight.dim() {
            return Err(Error::shape("gradient of a matrix", weight.dim(), gradient.dim()));
        }
        gradient.check_finite("gradient of a matrix")?;
        let (left, right, residual) = self.split(weight, budget.rank, cx)?;
        let product = &residual * &gradient;
        let scores = RowScore::Magnitude.of(product.view(), self.structure, None, cx)?;
        self.keep(left, right, &residual, top(&scores, budget.rows))
    }

    fn keep(
        &self,
        left: Array2<f32>,
        right: Array2<f32>,
        residual: &Array2<f32>,
        kept: Vec<u32>,
    ) -> Result<Factored> {
        let exact = self.structure.pick(residual.view(), &kept);
        Factored::new(left, right, self.structure, kept, exact)
    }
}

impl Stage for LowRankSparse {
    fn name(&self) -> &str {
        "low-rank-sparse"
    }
}

impl Decomposer for LowRankSparse {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, moments, budget, self.structure)?;
        let (left, right, residual) = self.split(weight, budget.rank, cx)?;
        let scores = self.score.of(residual.view(), self.structure, moments, cx)?;
        self.keep(left, right, &residual, top(&scores, budget.rows))
    }

    fn uses_moments(&self) -> bool {
        self.score == RowScore::Energy
    }
}
