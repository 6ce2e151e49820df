//! Low rank only, by whichever SVD the data at hand allow.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::{TruncatedSvd, Whitened};
use crate::error::Result;
use crate::linalg::SvdMethod;
use crate::model::Factored;
use crate::stage::{Context, Decomposer, Moments, RankBudget, Stage};

/// [`Whitened`] where there are moments of the inputs, [`TruncatedSvd`] where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowRank {
    /// `ε`: the damping of the moments, as a share of their mean diagonal entry.
    pub damping: f64,
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl Default for LowRank {
    /// A damping of 1e-6.
    fn default() -> Self {
        let Whitened { damping, svd } = Whitened::default();
        Self { damping, svd }
    }
}

impl Stage for LowRank {
    fn name(&self) -> &str {
        "low-rank"
    }
}

impl Decomposer for LowRank {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        let Self { damping, svd } = *self;
        match moments {
            Some(_) => Whitened { damping, svd }.decompose(weight, moments, budget, cx),
            None => TruncatedSvd { svd }.decompose(weight, moments, budget, cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn moments_decide_which_svd_it_is() {
        let (w, cx, rank) = (array![[3.0, 0.0], [0.0, 2.0]], Context::cpu(0), RankBudget::rank(1));
        let moments = Moments::new(array![[1.0, 0.0], [0.0, 25.0]], 1).unwrap();
        let dense = |moments: Option<&Moments>| {
            let found = LowRank::default().decompose(w.view(), moments, &rank, &cx).unwrap();
            found.to_dense(cx.compute()).unwrap()
        };
        approx::assert_abs_diff_eq!(dense(None), array![[3.0, 0.0], [0.0, 0.0]], epsilon = 1e-5);
        let white = dense(Some(&moments));
        approx::assert_abs_diff_eq!(white, array![[0.0, 0.0], [0.0, 2.0]], epsilon = 1e-4);
    }
}
