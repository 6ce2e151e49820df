//! Low rank only, by the SVD of the weights.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::{check, no_kept_rows};
use crate::error::Result;
use crate::linalg::SvdMethod;
use crate::model::{Factored, Structure};
use crate::stage::{Context, Decomposer, Moments, RankBudget, Stage};

/// `W ≈ U_r Σ_r V_rᵀ`, the best rank-`r` approximation in the Frobenius norm:
/// `‖W − L R‖² = Σ_{j > r} σ_j²` (Eckart and Young 1936), with `L = U_r Σ_r^½: (m, r)` and
/// `R = Σ_r^½ V_rᵀ: (r, n)` as in the paper's code. Moments are ignored. Parameters: `r (m + n)`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TruncatedSvd {
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl Stage for TruncatedSvd {
    fn name(&self) -> &str {
        "svd"
    }
}

impl Decomposer for TruncatedSvd {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, moments, budget, Structure::Rows)?;
        no_kept_rows("svd", budget)?;
        let svd = cx.truncated_svd(weight, budget.rank, self.svd)?;
        let (left, right) = svd.into_balanced();
        Factored::low_rank(left, right)
    }

    fn uses_moments(&self) -> bool {
        false
    }
}
