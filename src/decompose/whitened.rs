//! Low rank only, fitted to the layer's outputs.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::{Whitening, check, no_kept_rows};
use crate::error::{ErrorKind, Result};
use crate::linalg::SvdMethod;
use crate::model::{Factored, Structure};
use crate::stage::{Context, Decomposer, Moments, Needs, RankBudget, Stage};

/// The rank-`r` matrix whose outputs are nearest to those of `W` on the observed inputs.
///
/// With `C = Σ x xᵀ / tokens + ε (tr/n) I = S Sᵀ` ([`Whitening`]) and the SVD of `W S`:
/// `L = U_r Σ_r^½`, `R = Σ_r^½ V_rᵀ S⁻¹`, and `‖(W − L R) S‖² = Σ_{j > r} σ_j²` exactly.
///
/// Source: SVD-LLM (arXiv 2403.07378) and D2-MoE (arXiv 2502.17298), which store `S` in bf16 and
/// multiply by its inverse; here `S` is in `f64` and solved with. Cost beyond the SVD: `n³/3` for
/// Cholesky, `2 m n²` for `W S`, `r n²` for the solve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Whitened {
    /// `ε`: the damping of the moments, as a share of their mean diagonal entry.
    pub damping: f64,
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl Default for Whitened {
    /// A damping of 1e-6.
    fn default() -> Self {
        Self { damping: 1e-6, svd: SvdMethod::Auto }
    }
}

impl Stage for Whitened {
    fn name(&self) -> &str {
        "whitened-svd"
    }

    /// Its moments are made from samples.
    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Decomposer for Whitened {
    /// Needs the moments: [`ErrorKind::Missing`] without.
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        check(weight, moments, budget, Structure::Rows)?;
        no_kept_rows("whitened-svd", budget)?;
        let moments = moments.ok_or_else(|| ErrorKind::Missing {
            stage: "whitened-svd".into(),
            needs: "second moments of the inputs".into(),
            remedy: "collect them, or use svd, which does without".into(),
        })?;
        let whitening = Whitening::new(moments, self.damping, cx)?;
        let white = whitening.apply(weight, cx)?;
        let svd = cx.truncated_svd(white.view(), budget.rank, self.svd)?;
        let (left, right) = svd.into_balanced();
        Factored::low_rank(left, whitening.undo(right.view(), cx)?)
    }
}
