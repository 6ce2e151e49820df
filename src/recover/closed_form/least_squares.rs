//! All down projections of a layer, refitted together in closed form.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::block_gauss_seidel::BlockGaussSeidel;
use super::by_tokens::{by_tokens, choose};
use super::features::Features;
use super::held_out::HeldOutSelector;
use super::normal_equations::{Deltas, NormalEquations};
use super::subsample::Subsampled;
use crate::error::{Locate, Result};
use crate::model::{Expert, Linear, MergedLayer};
use crate::recover::best_so_far::descending;
use crate::recover::recoverer;
use crate::stage::{Context, Recovery, Stage};

/// Refits the down projections of all merged experts of a layer together:
///
/// `W' = argmin Σ_x ‖Σ_e w_e(x) (W'_e h_e(x) + b_e) − t(x)‖² + λ Σ_e ‖W'_e − W_e‖²`,
///
/// with `h_e(x): (d_ff)` the hidden activations, `w_e(x)` the applied weight (members of a group
/// that fire together add up) and `t(x)` the original layer's output. Biases stay. In terms of what
/// is added, `Δ = W' − W`, these are the normal equations `(Φᵀ Φ + λ I) Δᵀ = Φᵀ R`: `Φ: (t, m ·
/// d_ff)` holds the weighted hidden activations, `R: (t, d_model)` the residual of the merged
/// layer, and `λ = ridge · tr(Φᵀ Φ) / min(t, m · d_ff)`, relative to the mean eigenvalue also where
/// tokens are fewer than features. The ridge is the one of [`LeastSquares::ridges`] with the least
/// error on the held-out rows; where fewer tokens are fitted than twice the features, only those
/// from 0.1 on are tried, where more than six times, only those up to 0.1, if there is one. Experts
/// that no token visits keep every bit.
///
/// Three ways lead to the solution, and the sizes decide which is taken:
///
/// - **By features**, up to `dense_limit` of them: one Gram matrix in `f64`, of which only the
///   blocks of experts that fire together are computed (`t k² d_ff²` operations), and a Cholesky
///   factorisation per ridge (`(m d_ff)³/3`), from the smallest ridge up until the held-out error
///   rises; memory `16 (m d_ff)²` bytes.
/// - **By tokens**, up to `token_limit` that are fitted, where they are fewer than features or
///   features too many: `Δᵀ = Φᵀ (Φ Φᵀ + λ I)⁻¹ R`, the same solution. `t² k² d_ff / m` operations
///   for the products in `f64`, `t³/3 + 2 t² d_model` for the solution, and memory `16 t²` bytes.
/// - **By block Gauss–Seidel** beyond: no system is formed. A pass goes over the experts in order
///   and solves for the features of one, at most 2,048 at a time (`b`), by the Cholesky factor of
///   their own Gram block, while all others are held; the residual follows. Once `t k b` operations
///   in `f64` a feature block and `b³` for its inverse; a pass `4 t k d_ff d_model + 2 m d_ff b
///   d_model` operations. On wide layers without half of their experts five passes are within 2.5 %
///   of the exact solution's held-out error, eight within 0.2 %. Memory `4 m d_ff (b + 2 d_model)`
///   bytes.
///
/// The last two choose `λ` by fits to at most 2,048 of the tokens, evenly apart, in the form of
/// tokens: from the largest ridge down until the held-out error rises, with the mean eigenvalue of
/// those tokens. All keep the hidden activations, `4 t k d_ff` bytes.
///
/// Source: MergeMoE (Miao et al., arXiv 2510.14436) solves a merged expert's down projection for
/// the members' combined output, a group at a time and without a ridge. Ours fits all experts of a
/// layer together, to the layer's own output, and so also makes up for dropped experts and for a
/// narrowed router. Block Gauss–Seidel is textbook (Golub and Van Loan, *Matrix Computations*,
/// §11.2); an expert as the block is our choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeastSquares {
    /// Pulls towards the current weights to choose from, relative to the mean eigenvalue of the
    /// Gram matrix; each above 0.
    pub ridges: Vec<f64>,
    /// The most features, `m · d_ff`, for which a Gram matrix is formed.
    pub dense_limit: usize,
    /// The most fitted tokens for which products between tokens are formed.
    pub token_limit: usize,
    /// The most tokens that are fitted, evenly apart, where features are more than `dense_limit`;
    /// all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub most_tokens: Option<usize>,
    /// The most passes of block Gauss–Seidel.
    pub iterations: usize,
    /// Block Gauss–Seidel stops after a pass that lowers its loss by no more than this share.
    pub tolerance: f64,
}

impl Default for LeastSquares {
    fn default() -> Self {
        Self {
            ridges: vec![1e-3, 1e-2, 1e-1, 1.0],
            dense_limit: 4096,
            token_limit: 8192,
            most_tokens: None,
            iterations: 8,
            tolerance: 1e-3,
        }
    }
}

impl Stage for LeastSquares {
    fn name(&self) -> &str {
        "least-squares"
    }
}

recoverer!(LeastSquares);

/// The least ridge to choose where tokens are few, for so many features: then a fit can follow the
/// noise, and the tenth of the tokens that is held out may not tell. Of 256 tokens, 0.1 and more
/// left Mixtral, Qwen3-MoE and OLMoE at 4.182, 4.014 and 3.882 nats, 0.01 to choose as well at
/// 4.212, 4.079 and 3.931.
///
/// And the largest where tokens are many: of 7,373 for at most 1,024 features, 1 to choose as well
/// left the three where they were, or worse by 0.003.
const SAFE_RIDGE: f64 = 0.1;

/// Fitted tokens for each feature below which tokens are few.
const FEW_TOKENS_PER_FEATURE: usize = 2;

/// And above which they are many.
const MANY_TOKENS_PER_FEATURE: usize = 6;

impl LeastSquares {
    fn fit(&self, task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer> {
        task.check(&merged)?;
        let features: usize = merged.experts.iter().map(|e| e.view().d_ff()).sum();
        let few = self.subsampled(features, task.fitted());
        let ridges = self.candidates(features, few)?;
        let found = match few < task.fitted() {
            true => {
                self.deltas(Subsampled::of(task, few).task(), (&merged, features), &ridges, cx)?
            }
            false => self.deltas(*task, (&merged, features), &ridges, cx)?,
        };
        match found {
            None => Ok(merged),
            Some(deltas) => refitted(merged, &deltas),
        }
    }

    /// How many of the tokens that may be fitted are.
    pub(crate) fn subsampled(&self, features: usize, fitted: usize) -> usize {
        let most = self.most_tokens.filter(|_| features > self.dense_limit);
        most.map_or(fitted, |most| most.min(fitted))
    }

    /// The ridges to choose from, the largest first.
    pub(crate) fn candidates(&self, features: usize, fitted: usize) -> Result<Vec<f64>> {
        let mut ridges = descending(&self.ridges)?;
        let safe = ridges.partition_point(|&ridge| ridge >= SAFE_RIDGE);
        if fitted < FEW_TOKENS_PER_FEATURE * features && safe > 0 {
            ridges.truncate(safe);
        }
        let above = ridges.partition_point(|&ridge| ridge > SAFE_RIDGE);
        if fitted > MANY_TOKENS_PER_FEATURE * features && above < ridges.len() {
            ridges.drain(..above);
        }
        Ok(ridges)
    }

    /// The smaller system, if it is within its limit.
    pub(crate) fn solver(&self, features: usize, fitted: usize) -> Solver {
        let (dense, short) = (features <= self.dense_limit, fitted <= self.token_limit);
        match (dense, short) {
            (_, true) if fitted < features || !dense => Solver::Tokens,
            (true, _) => Solver::Features,
            (false, _) => Solver::Blocks,
        }
    }

    fn deltas(
        &self,
        task: Recovery<'_>,
        (merged, features): (&MergedLayer, usize),
        ridges: &[f64],
        cx: &Context,
    ) -> Result<Option<Deltas>> {
        match self.solver(features, task.fitted()) {
            Solver::Features => self.by_features(&task, merged, ridges, cx),
            Solver::Tokens => by_tokens(&task, merged, ridges, cx),
            Solver::Blocks => self.by_blocks(&task, merged, ridges, cx),
        }
    }

    /// From a system of as many equations as there are features.
    fn by_features(
        &self,
        task: &Recovery<'_>,
        merged: &MergedLayer,
        ridges: &[f64],
        cx: &Context,
    ) -> Result<Option<Deltas>> {
        let (features, residual) = Features::of_rows(task, 0..task.fitted(), merged, cx)?;
        let Some(mut system) = NormalEquations::new(&features, &residual, cx)? else {
            return Ok(None);
        };
        let mut selector = HeldOutSelector::of(task, merged, cx)?;
        // Here tokens are many, so that a small ridge is the likely choice.
        for &ridge in ridges.iter().rev() {
            if !selector.consider(system.solve(ridge, cx)?, cx)? && selector.found() {
                break;
            }
        }
        Ok(selector.best())
    }

    /// By block Gauss–Seidel, without a system.
    fn by_blocks(
        &self,
        task: &Recovery<'_>,
        merged: &MergedLayer,
        ridges: &[f64],
        cx: &Context,
    ) -> Result<Option<Deltas>> {
        let Some(lambda) = choose(task, merged, ridges, cx)? else { return Ok(None) };
        let (features, residual) = Features::of_rows(task, 0..task.fitted(), merged, cx)?;
        let blocks = BlockGaussSeidel::new(&features, lambda, cx)?;
        let deltas = blocks.solve(&residual, self.iterations, self.tolerance, cx)?;
        let mut selector = HeldOutSelector::of(task, merged, cx)?;
        selector.consider(deltas, cx)?;
        Ok(selector.best())
    }
}

/// How a fit of some size is solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Solver {
    /// One equation per feature.
    Features,
    /// One equation per fitted token.
    Tokens,
    /// Block Gauss–Seidel.
    Blocks,
}

/// The layer with `deltas` added to its down projections.
fn refitted(mut layer: MergedLayer, deltas: &Deltas) -> Result<MergedLayer> {
    let experts = std::mem::take(&mut layer.experts);
    let moved = experts.into_iter().zip(deltas).enumerate();
    layer.experts = moved
        .map(|(e, (expert, delta))| shifted(expert, delta).in_expert(e))
        .collect::<Result<_>>()?;
    Ok(layer)
}

/// The expert with `delta` added to its down projection.
fn shifted(expert: Expert, delta: &Array2<f32>) -> Result<Expert> {
    let activation = expert.view().activation;
    let (gate, up, Linear { mut weight, bias }) = expert.into_parts();
    weight += delta;
    Expert::new(gate, up, Linear { weight, bias }, activation)
}
