//! MergeMoE: merges outputs instead of weights, with the down projection by least squares.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::normal::{Normal, check_ridge};
use super::weighted::Weighting;
use crate::error::Result;
use crate::model::{Expert, Linear, Samples};
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// What the merged expert is to give for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// `Σ_i α_i E_i(x)`, the members' outputs weighted by their shares, whoever was chosen (the
    /// paper).
    #[default]
    Average,
    /// `Σ_{i ∈ S(x)} g_i(x) E_i(x)` for the weight `Σ_{i ∈ S(x)} g_i(x)`: what the members that the
    /// router chose gave.
    Routed,
}

/// Gate and up are averages, down reproduces the members' combined output:
///
/// `W_down' = argmin_W Σ_x ‖s(x) W h'(x) − Σ_i c_i(x) W_down,i h_i(x)‖² + λ ‖W − W⁰‖²`,
///
/// `h'` the hidden activations of the averaged gate and up, `s = Σ_i c_i`, `c_i(x) = α_i`
/// ([`Wanted::Average`]) or `[i ∈ S(x)] g_i(x)` ([`Wanted::Routed`]), `W⁰ = Σ_i α_i W_down,i`, over
/// the tokens routed to any member; `λ = ridge · tr(Σ s² h' h'ᵀ) / f`. In the paper's terms the
/// merged expert is `W_D' T₁ [σ(T₂ W_G' x) ⊙ (T₃ W_U' x)]` with the members' matrices side by side
/// in `W_D'` and stacked in `W_G'`, `W_U'`: `T₂ = T₃ = [α_1 I … α_K I]`, and `T₁` is the solution.
/// Biases are averaged by the same shares.
///
/// Cost for `t` tokens of the group: `(6 K + 4) t d f + 2 t f²` operations, a Cholesky
/// factorisation of `(f, f)` in `f64`; memory `8 f (f + d)` bytes and `4 t (2 d + 2 f)`.
///
/// Source: MergeMoE (Miao et al., arXiv 2510.14436). *Deviations:* tokens of the group instead of
/// all; the members are lined up before, if the recipe says so; a ridge towards the averaged down
/// projection where the paper takes a pseudo-inverse, so that few tokens do no harm;
/// [`Wanted::Routed`] is ours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergeMoe {
    /// What a member counts for.
    pub by: Weighting,
    /// The output that is fitted.
    pub wanted: Wanted,
    /// Pull towards the average, relative to the mean diagonal; above 0.
    pub ridge: f64,
}

impl Default for MergeMoe {
    /// By usage, as the paper.
    fn default() -> Self {
        Self { by: Weighting::Usage, wanted: Wanted::Average, ridge: 1e-3 }
    }
}

impl Stage for MergeMoe {
    fn name(&self) -> &str {
        "merge-moe"
    }

    fn needs(&self) -> Needs {
        self.by.needs() | Needs::SAMPLES
    }
}

impl Merger for MergeMoe {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        check_ridge(self.ridge)?;
        let shares = self.by.shares(members, cx)?;
        let average = members.average(&shares, cx)?;
        let samples = members.layer.stats.need_samples(self.name())?;
        let tokens = samples.tokens_of(members.indices);
        if tokens.is_empty() {
            return Ok(average);
        }
        let x = samples.inputs.select(Axis(0), &tokens);
        let counts = match self.wanted {
            Wanted::Average => {
                Array2::from_shape_fn((tokens.len(), shares.len()), |(_, i)| shares[i] as f32)
            }
            Wanted::Routed => routed(samples, &tokens, members.indices),
        };
        let mut hidden = average.view().hidden(x.view(), cx.compute())?;
        times(&mut hidden, &counts.sum_axis(Axis(1)).to_vec());
        let missed = missed(members, &average, &hidden, (x.view(), &counts), cx)?;
        let mut system = Normal::new(hidden.ncols(), missed.ncols());
        system.add(hidden.view(), missed.view(), cx)?;
        let Some(delta) = system.solve(self.ridge, cx)? else { return Ok(average) };
        let activation = average.view().activation;
        let (gate, up, down) = average.into_parts();
        let down = Linear { weight: down.weight + delta, bias: down.bias };
        Expert::new(gate, up, down, activation)
    }
}

/// `Σ_i c_i W_down,i h_i − W⁰ s h'` for every token: `(t, d_model)`.
fn missed(
    members: &Members<'_>,
    average: &Expert,
    hidden: &Array2<f32>,
    (x, counts): (ArrayView2<'_, f32>, &Array2<f32>),
    cx: &Context,
) -> Result<Array2<f32>> {
    let compute = cx.compute();
    let down = average.view().down.weight;
    let mut missed = Array2::zeros((x.nrows(), down.nrows()));
    compute.gemm(-1.0, hidden.view(), down.t(), 0.0, missed.view_mut())?;
    for (i, counts) in counts.columns().into_iter().enumerate() {
        let expert = members.aligned(i, cx)?;
        let mut own = expert.view().hidden(x, compute)?;
        times(&mut own, &counts.to_vec());
        compute.gemm(1.0, own.view(), expert.view().down.weight.t(), 1.0, missed.view_mut())?;
    }
    Ok(missed)
}

fn times(rows: &mut Array2<f32>, by: &[f32]) {
    rows.rows_mut().into_iter().zip(by).for_each(|(mut row, w)| row *= *w);
}

/// `g_i(x)` of the chosen members, 0 of the others: `(tokens, members)`.
fn routed(samples: &Samples, tokens: &[usize], members: &[usize]) -> Array2<f32> {
    let mut counts = Array2::zeros((tokens.len(), members.len()));
    for (mut row, &t) in counts.rows_mut().into_iter().zip(tokens) {
        let slots = samples.routing.experts.row(t);
        for (&expert, &w) in slots.iter().zip(samples.routing.weights.row(t)) {
            if let Some(at) = members.iter().position(|&i| i == expert as usize) {
                row[at] += w;
            }
        }
    }
    counts
}
