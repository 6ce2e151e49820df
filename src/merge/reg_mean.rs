//! RegMean: the average that keeps each member's linear responses on its own inputs.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::normal::{Normal, check_ridge};
use super::weighted::Weighting;
use crate::error::{Error, Result};
use crate::linalg::{Compute, add_cross};
use crate::model::{Expert, ExpertView, Linear, Role};
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// For every matrix `W' = argmin Σ_i Σ_{x ∈ X_i} ‖W' x − P_i(W_i) x‖²`, in closed form:
///
/// `W'ᵀ = (Σ_i G̃_i + λ I)⁻¹ (Σ_i G̃_i P_i(W_i)ᵀ + λ W⁰ᵀ)`, `G_i = Σ_{x ∈ X_i} x xᵀ`,
/// `G̃ = α G + (1 − α) diag G`.
///
/// `X_i` are the inputs routed to member `i`: the layer's for gate and up, its own (lined-up)
/// hidden activations for down. `W⁰` is the average by usage, towards which
/// `λ = ridge · tr(Σ G̃) / in` pulls what no token reaches. It is solved for `W' − W⁰`, so that
/// identical members keep every bit that the average keeps. Biases are averaged by usage.
///
/// Cost: `2 t_i (d² + 3 d f + f²)` operations a member, a Cholesky factorisation of `(d, d)` and
/// one of `(f, f)`, all in `f64`; memory `16 (d² + 2 d f)` bytes, then `16 (f² + d f)`, and
/// `4 t_i (d + f)` for the member at hand.
///
/// Source: Jin et al., RegMean (arXiv 2212.09849), eq. 2 and the scaling of off-diagonal entries in
/// §4. *Deviations:* experts of a layer instead of whole models, each on the tokens that its router
/// sends it, so that usage weighs by itself; the pull towards the average, for layers wider than a
/// member's tokens are many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegMean {
    /// What off-diagonal entries of the second moments count for, 0 to 1.
    pub alpha: f64,
    /// Pull towards the average, relative to the mean diagonal; above 0.
    pub ridge: f64,
}

impl Default for RegMean {
    /// `α = 0.9`, as the authors.
    fn default() -> Self {
        Self { alpha: 0.9, ridge: 1e-4 }
    }
}

impl Stage for RegMean {
    fn name(&self) -> &str {
        "reg-mean"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Merger for RegMean {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        check_ridge(self.ridge)?;
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(Error::range("alpha of reg-mean", "0 to 1", self.alpha));
        }
        let average = members.average(&Weighting::Usage.weights(members, cx)?, cx)?;
        let samples = members.layer.stats.need_samples(self.name())?;
        let inputs = |i: usize| samples.inputs_of(&[members.indices[i]]);
        let of = |roles: &[Role]| self.deltas(members, &average, roles, inputs, cx);
        let mut input = of(&[Role::Gate, Role::Up])?.into_iter();
        let (gate, up) = (input.next().flatten(), input.next().flatten());
        let down = of(&[Role::Down])?.into_iter().next().flatten();
        let activation = average.view().activation;
        let (g, u, d) = average.into_parts();
        Expert::new(g.map(|g| moved(g, gate)), moved(u, up), moved(d, down), activation)
    }
}

/// The projection with `delta` added.
fn moved(linear: Linear, delta: Option<Array2<f32>>) -> Linear {
    let weight = match delta {
        Some(delta) => linear.weight + delta,
        None => linear.weight,
    };
    Linear { weight, ..linear }
}

impl RegMean {
    /// `W' − W⁰` of some projections that share their inputs; `None` where there is no such
    /// projection, or no token.
    fn deltas(
        &self,
        members: &Members<'_>,
        average: &Expert,
        roles: &[Role],
        inputs: impl Fn(usize) -> Array2<f32>,
        cx: &Context,
    ) -> Result<Vec<Option<Array2<f32>>>> {
        let start = average.view();
        let zero = |role: &Role| {
            let (out, input) = start.linear(*role)?.weight.dim();
            Some(Normal::new(input, out))
        };
        let mut systems: Vec<Option<Normal>> = roles.iter().map(zero).collect();
        for i in 0..members.experts.len() {
            let mut x = inputs(i);
            if x.nrows() == 0 {
                continue;
            }
            let expert = members.aligned(i, cx)?;
            if roles.contains(&Role::Down) {
                x = expert.view().hidden(x.view(), cx.compute())?;
            }
            let mut gram = Array2::zeros((x.ncols(), x.ncols()));
            cx.compute().add_gram(x.view(), &mut gram)?;
            for (system, role) in systems.iter_mut().zip(roles) {
                let Some(system) = system else { continue };
                let Some(apart) = apart(&expert.view(), &start, *role) else { continue };
                let cross = response(x.view(), &apart, cx.compute())?;
                system.add_scaled(&gram, &cross, apart.view(), self.alpha);
            }
        }
        let solve = |s: Option<Normal>| s.map_or(Ok(None), |s| s.solve(self.ridge, cx));
        systems.into_iter().map(solve).collect()
    }
}

/// What a member's matrix has beyond the average's.
fn apart(expert: &ExpertView<'_>, average: &ExpertView<'_>, role: Role) -> Option<Array2<f32>> {
    Some(&expert.linear(role)?.weight - &average.linear(role)?.weight)
}

/// `Xᵀ (X Wᵀ) = G Wᵀ: (in, out)`, without a product of `f64` matrices.
fn response(
    x: ArrayView2<'_, f32>,
    weight: &Array2<f32>,
    compute: &dyn Compute,
) -> Result<Array2<f64>> {
    let mut y = Array2::zeros((x.nrows(), weight.nrows()));
    compute.gemm(1.0, x, weight.t(), 0.0, y.view_mut())?;
    let mut cross = Array2::zeros((x.ncols(), weight.nrows()));
    add_cross(x, y.view(), cross.view_mut())?;
    Ok(cross)
}
