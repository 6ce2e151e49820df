//! Weight matching: aligns hidden units whose weights agree (the paper's method).

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::reference::check_pair;
use crate::error::{Error, Result};
use crate::linalg::{Product, assign, assign_within};
use crate::model::{ExpertView, LinearView, Permutation, Role};
use crate::stage::{AlignPair, Aligner, Context, Stage};

/// Maximises `Σ_a C[a, p(a)]` over permutations `p`, with the gain `C: (d_ff, d_ff)`
///
/// `C = W_gate,r W_gate,tᵀ + W_up,r W_up,tᵀ + W_down,rᵀ W_down,t`
///
/// of a reference `r` and a target `t`; two-matrix experts have no gate term. A hidden unit's bias
/// (of gate and up) is one more column of its matrix. Since a permutation keeps every norm, this
/// minimises the squared distance of the two experts' weights; an expert has one layer of hidden
/// units, so one linear assignment is the whole optimum.
///
/// Cost: three `d_ff × d_model × d_ff` products and one assignment on one thread, `O(d_ff³)` in the
/// worst case. Memory: the gain, `d_ff²` `f32` (64 MiB at `d_ff` = 4096, 784 MiB at 14336), besides
/// what the assignment needs.
///
/// Source: M-SMoE (arXiv 2310.01334, §3.2), after Git Re-Basin (arXiv 2209.04836). *Deviations*:
/// gated experts, which the paper's code does not align at all; `normalise` and `tolerance`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightMatching {
    /// Whether the down projection counts; the paper's `include_wo`. Default: true.
    pub include_down: bool,
    /// Whether each matrix's term is divided by the Frobenius norms of its two matrices, so that
    /// one with large entries does not decide alone. Default: false, as in the paper.
    pub normalise: bool,
    /// Relative distance to the optimum at which the assignment may stop; 0, the default, is exact.
    pub tolerance: f64,
}

impl Default for WeightMatching {
    fn default() -> Self {
        Self { include_down: true, normalise: false, tolerance: 0.0 }
    }
}

impl Stage for WeightMatching {
    fn name(&self) -> &str {
        "weight-matching"
    }
}

impl Aligner for WeightMatching {
    fn align(&self, pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation> {
        check_pair(pair)?;
        if !(self.tolerance.is_finite() && self.tolerance >= 0.0) {
            return Err(Error::range("weight-matching tolerance", "0 or more", self.tolerance));
        }
        let gain = self.gain(&pair.reference, &pair.target, cx)?;
        let best = match self.tolerance {
            0.0 => assign(gain.view())?,
            tolerance => assign_within(gain.view(), tolerance)?,
        };
        Permutation::new(best.columns)
    }
}

impl WeightMatching {
    /// The gain `C: (d_ff, d_ff)`, summed term by term into one buffer.
    fn gain<'a>(
        &self,
        r: &ExpertView<'a>,
        t: &ExpertView<'a>,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let units = r.d_ff();
        let mut terms = Vec::new();
        let mut add = |alpha, a, b: ArrayView2<'a, f32>| {
            terms.push(Product { alpha, a, b: b.reversed_axes() });
        };
        for role in [Role::Gate, Role::Up, Role::Down] {
            let (Some(r), Some(t)) = (r.linear(role), t.linear(role)) else { continue };
            if role == Role::Down {
                if self.include_down {
                    // The bias of the down projection belongs to no hidden unit.
                    let (r, t) = (LinearView { bias: None, ..r }, LinearView { bias: None, ..t });
                    let alpha = self.scale(&r, &t);
                    add(alpha, r.weight.reversed_axes(), t.weight.reversed_axes());
                }
                continue;
            }
            let alpha = self.scale(&r, &t);
            add(alpha, r.weight, t.weight);
            if let (Some(r), Some(t)) = (r.bias, t.bias) {
                add(alpha, r.insert_axis(Axis(1)), t.insert_axis(Axis(1)));
            }
        }
        let mut gain = Array2::zeros((units, units));
        cx.compute().gemm_sum(&terms, gain.view_mut())?;
        Ok(gain)
    }

    fn scale(&self, r: &LinearView<'_>, t: &LinearView<'_>) -> f32 {
        let norms = if self.normalise { norm(r) * norm(t) } else { 1.0 };
        if norms > 0.0 { (1.0 / norms) as f32 } else { 1.0 }
    }
}

/// Frobenius norm of a projection, bias included.
fn norm(linear: &LinearView<'_>) -> f64 {
    let bias = linear.bias.into_iter().flatten();
    linear.weight.iter().chain(bias).map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt()
}
