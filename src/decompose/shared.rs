//! One base for the experts of a layer, and a low-rank delta for each.

use ndarray::{Array2, ArrayView2, Axis, concatenate};
use serde::{Deserialize, Serialize};

use super::{Whitening, check};
use crate::error::{Error, Result};
use crate::linalg::{SvdMethod, Term};
use crate::model::Structure;
use crate::par;
use crate::stage::{Context, Moments, RankBudget};

/// `W_j ≈ W̄ + L_j R_j` for the same projection of all experts of a layer, with the base
/// `W̄ = Σ_j w_j W_j / Σ w_j` and the whitened SVD of the deltas `W_j − W̄`.
///
/// With `shared_right` there is one `R`, from the SVD of the deltas stacked on top of each other,
/// `[Δ_1; …; Δ_N] S`, with the moments of all experts added.
///
/// Source: D2-MoE (arXiv 2502.17298) §3. Deviations: its shared basis averages Cholesky factors
/// where the moments are what adds up; it stores them in bf16 and inverts them. Its Fisher-weighted
/// base is [`Fisher`](../merge/struct.Fisher.html) merging of the group of all experts; its
/// pruning of the base at run time is left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SharedBasis {
    /// Whether all deltas share `R`.
    pub shared_right: bool,
    /// `ε`: the damping of the moments, as a share of their mean diagonal entry.
    pub damping: f64,
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl Default for SharedBasis {
    /// A delta of its own for every expert, a damping of 1e-6.
    fn default() -> Self {
        Self { shared_right: false, damping: 1e-6, svd: SvdMethod::Auto }
    }
}

/// A base and its deltas.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseAndDeltas {
    base: Array2<f32>,
    lefts: Vec<Array2<f32>>,
    rights: Vec<Array2<f32>>,
}

impl BaseAndDeltas {
    /// `W̄: (m, n)`.
    pub fn base(&self) -> ArrayView2<'_, f32> {
        self.base.view()
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.lefts.len()
    }

    /// `L_j: (m, r)` and `R_j: (r, n)`; `None` beyond the experts.
    pub fn delta(&self, expert: usize) -> Option<(ArrayView2<'_, f32>, ArrayView2<'_, f32>)> {
        let right = self.rights.get(expert).or(self.rights.first())?;
        Some((self.lefts.get(expert)?.view(), right.view()))
    }

    /// `W̄ + L_j R_j: (m, n)`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) beyond the experts.
    pub fn to_dense(&self, expert: usize, cx: &Context) -> Result<Array2<f32>> {
        let (left, right) = self.delta(expert).ok_or_else(|| {
            Error::range("expert", format!("a number below {}", self.experts()), expert)
        })?;
        let mut out = self.base.clone();
        if left.ncols() > 0 {
            cx.compute().gemm(1.0, left, right, 1.0, out.view_mut())?;
        }
        Ok(out)
    }

    /// Numbers stored: `m n + N r (m + n)`, or `m n + r (N m + n)` with a shared `R`.
    pub fn parameters(&self) -> usize {
        let sum = |parts: &[Array2<f32>]| parts.iter().map(|part| part.len()).sum::<usize>();
        self.base.len() + sum(&self.lefts) + sum(&self.rights)
    }
}

/// All `L_j`, and all `R_j` or the one that they share.
type Factors = (Vec<Array2<f32>>, Vec<Array2<f32>>);

impl SharedBasis {
    /// Splits the matrices `(m, n)` of all experts, with `shares` (usage, say) for the base and the
    /// moments of each expert's inputs, `None` for those without. One task an expert.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the lists or shapes differ or are empty;
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a rank of 0 or above full, and
    /// for shares that are negative or all 0; those of the decomposition.
    pub fn split(
        &self,
        weights: &[ArrayView2<'_, f32>],
        shares: &[f64],
        moments: &[Option<&Moments>],
        rank: usize,
        cx: &Context,
    ) -> Result<BaseAndDeltas> {
        let base = average(weights, shares, cx)?;
        if moments.len() != weights.len() {
            return Err(Error::shape("moments of all experts", weights.len(), moments.len()));
        }
        for (&weight, &moments) in weights.iter().zip(moments) {
            check(weight, moments, &RankBudget::rank(rank), Structure::Rows)?;
        }
        let (lefts, rights) = match self.shared_right {
            true => self.stacked(weights, &base, moments, rank, cx)?,
            false => par::map(weights.len(), |j| {
                self.factor((&weights[j] - &base).view(), moments[j], rank, &cx.per_task())
            })?
            .into_iter()
            .unzip(),
        };
        Ok(BaseAndDeltas { base, lefts, rights })
    }

    fn stacked(
        &self,
        weights: &[ArrayView2<'_, f32>],
        base: &Array2<f32>,
        moments: &[Option<&Moments>],
        rank: usize,
        cx: &Context,
    ) -> Result<Factors> {
        let deltas: Vec<_> = weights.iter().map(|weight| weight - base).collect();
        let views: Vec<_> = deltas.iter().map(|delta| delta.view()).collect();
        let stack = concatenate(Axis(0), &views)
            .map_err(|_| Error::shape("stacked deltas", base.dim(), "others"))?;
        let mut pooled: Option<Moments> = None;
        for moments in moments.iter().flatten() {
            match &mut pooled {
                Some(pooled) => pooled.add(moments)?,
                None => pooled = Some((*moments).clone()),
            }
        }
        let (left, right) = self.factor(stack.view(), pooled.as_ref(), rank, cx)?;
        let parts = left.axis_chunks_iter(Axis(0), base.nrows());
        Ok((parts.map(|part| part.to_owned()).collect(), vec![right]))
    }

    fn factor(
        &self,
        delta: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        rank: usize,
        cx: &Context,
    ) -> Result<(Array2<f32>, Array2<f32>)> {
        let fit = |a: ArrayView2<'_, f32>| -> Result<_> {
            Ok(cx.truncated_svd(a, rank, self.svd)?.into_balanced())
        };
        let Some(moments) = moments else { return fit(delta) };
        let whitening = Whitening::new(moments, self.damping, cx)?;
        let (left, right) = fit(whitening.apply(delta, cx)?.view())?;
        Ok((left, whitening.undo(right.view(), cx)?))
    }
}

fn average(weights: &[ArrayView2<'_, f32>], shares: &[f64], cx: &Context) -> Result<Array2<f32>> {
    if shares.len() != weights.len() {
        return Err(Error::shape("shares of all experts", weights.len(), shares.len()));
    }
    let total: f64 = shares.iter().sum();
    if shares.iter().any(|s| *s < 0.0) || !(total.is_finite() && total > 0.0) {
        return Err(Error::range("shares of the base", "0 or more, not all 0", total));
    }
    let pairs = weights.iter().zip(shares);
    let terms: Vec<_> = pairs.map(|(w, s)| Term::plain((s / total) as f32, w.view())).collect();
    cx.compute().weighted_sum(&terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn weights() -> Vec<Array2<f32>> {
        let value =
            |i: usize, j: usize, e: usize| ((i * 13 + j * 7 + e * 29) % 17) as f32 / 8.5 - 1.0;
        (0..3).map(|e| Array2::from_shape_fn((5, 4), |(i, j)| value(i, j, e * e))).collect()
    }

    #[test]
    fn full_rank_is_exact_and_the_base_is_the_weighted_average() {
        let (weights, cx) = (weights(), Context::cpu(0));
        let views: Vec<_> = weights.iter().map(|w| w.view()).collect();
        let inputs = array![[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 3.0, -1.0]];
        let moments = Moments::of(inputs.view(), cx.compute()).unwrap();
        for shared_right in [false, true] {
            for moments in [[None; 3], [Some(&moments), None, Some(&moments)]] {
                let how = SharedBasis { shared_right, damping: 1e-3, ..SharedBasis::default() };
                let split = how.split(&views, &[1.0, 1.0, 2.0], &moments, 4, &cx).unwrap();
                let mean = (&weights[0] + &weights[1] + &weights[2] * 2.0) / 4.0;
                approx::assert_abs_diff_eq!(split.base().to_owned(), mean, epsilon = 1e-6);
                for (j, w) in weights.iter().enumerate() {
                    approx::assert_abs_diff_eq!(split.to_dense(j, &cx).unwrap(), w, epsilon = 1e-4);
                }
                let factors = if shared_right { 4 * (3 * 5 + 4) } else { 3 * 4 * (5 + 4) };
                assert_eq!(split.parameters(), 20 + factors);
            }
        }
    }

    #[test]
    fn a_shared_basis_is_the_best_for_the_stack() {
        let (weights, cx) = (weights(), Context::cpu(0));
        let views: Vec<_> = weights.iter().map(|w| w.view()).collect();
        let how = SharedBasis { shared_right: true, ..SharedBasis::default() };
        let split = how.split(&views, &[1.0; 3], &[None; 3], 2, &cx).unwrap();
        let deltas: Vec<_> = weights.iter().map(|w| w - &split.base()).collect();
        let deltas: Vec<_> = deltas.iter().map(|d| d.view()).collect();
        let sigma =
            crate::linalg::singular_values(concatenate(Axis(0), &deltas).unwrap().view()).unwrap();
        let error = |j: usize| {
            let gap = split.to_dense(j, &cx).unwrap() - &weights[j];
            gap.iter().map(|x| x * x).sum::<f32>()
        };
        let best: f32 = sigma[2..].iter().map(|s| s * s).sum();
        approx::assert_relative_eq!((0..3).map(error).sum::<f32>(), best, max_relative = 1e-4);
    }

    #[test]
    fn misfits_are_errors() {
        let (weights, cx) = (weights(), Context::cpu(0));
        let views: Vec<_> = weights.iter().map(|w| w.view()).collect();
        let how = SharedBasis::default();
        assert!(how.split(&views, &[1.0; 2], &[None; 3], 2, &cx).is_err());
        assert!(how.split(&views, &[0.0; 3], &[None; 3], 2, &cx).is_err());
        assert!(how.split(&views, &[1.0; 3], &[None; 2], 2, &cx).is_err());
        assert!(how.split(&[], &[], &[], 2, &cx).is_err());
        for rank in [0, 5] {
            assert!(how.split(&views, &[1.0; 3], &[None; 3], rank, &cx).is_err());
        }
        assert!(
            how.split(&views, &[1.0; 3], &[None; 3], 2, &cx).unwrap().to_dense(3, &cx).is_err()
        );
    }
}
