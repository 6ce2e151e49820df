//! The router: which experts a token visits, and with which weights.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::check::Finite;
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::par;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Softmax over all experts, then top-k (Mixtral, Qwen, OLMoE, DeepSeek-V2, Switch).
    Softmax,
    /// An independent sigmoid per expert (DeepSeek-V3, GLM-4, dots1, MiniMax-M2).
    Sigmoid,
    /// Top-k of the logits, then softmax over the chosen ones (gpt-oss, GraniteMoE).
    SoftmaxOfTopK,
}

/// How the score of a routing group follows from its experts'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The best expert's (DeepSeek-V2).
    Max,
    /// The sum of the best two (DeepSeek-V3).
    TopTwoSum,
}

/// Group-limited routing: experts form `groups` contiguous blocks, of which `chosen` are eligible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingGroups {
    /// Number of blocks (`n_group`).
    pub groups: usize,
    /// Number of eligible blocks per token (`topk_group`).
    pub chosen: usize,
    /// What a block is ranked by.
    pub score: GroupScore,
}

impl RoutingGroups {
    /// Why `experts` cannot be routed in these groups with `top_k`, if they cannot.
    ///
    /// Runtimes do not check this: an uneven split returns scrambled groups for some batch sizes.
    pub fn misfit(&self, experts: usize, top_k: usize) -> Option<String> {
        let Self { groups, chosen, score } = *self;
        let least = if score == GroupScore::TopTwoSum { 2 } else { 1 };
        if groups == 0 || chosen == 0 || chosen > groups {
            Some(format!("{chosen} of {groups} routing groups"))
        } else if !experts.is_multiple_of(groups) {
            Some(format!("{experts} experts do not divide into {groups} routing groups"))
        } else if experts / groups < least {
            Some(format!("a routing group would hold {}, needs {least}", experts / groups))
        } else if chosen * (experts / groups) < top_k {
            let eligible = chosen * (experts / groups);
            Some(format!("{eligible} eligible experts for top-{top_k}"))
        } else {
            None
        }
    }
}

/// The routing policy: everything but the weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RoutingRule {
    /// How logits become scores.
    pub score: Score,
    /// Experts per token.
    pub top_k: usize,
    /// Whether the chosen scores are divided by their sum.
    pub renormalise: bool,
    /// Factor on the final weights (`routed_scaling_factor`).
    pub scale: f32,
    /// Group-limited routing, if any.
    pub groups: Option<RoutingGroups>,
}

impl RoutingRule {
    /// Softmax, top-k, optional renormalisation, nothing else.
    pub fn softmax(top_k: usize, renormalise: bool) -> Self {
        Self { score: Score::Softmax, top_k, renormalise, scale: 1.0, groups: None }
    }
}

/// The chosen experts of `t` tokens and the weights that the model applies.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// `(t, k)` expert indices, best first.
    pub experts: Array2<u32>,
    /// `(t, k)` applied weights.
    pub weights: Array2<f32>,
}

impl Routing {
    /// The `(token, slot weight)` pairs of each of `n` experts, tokens ascending.
    pub fn by_expert(&self, n: usize) -> Vec<Vec<(usize, f32)>> {
        let mut pairs = vec![Vec::new(); n];
        for (t, (chosen, weights)) in
            self.experts.rows().into_iter().zip(self.weights.rows()).enumerate()
        {
            for (&e, &w) in chosen.iter().zip(weights) {
                pairs[e as usize].push((t, w));
            }
        }
        pairs
    }
}

/// A router: logits `z = W x + b`, scores, top-k, weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
    correction: Option<Array1<f32>>,
    rule: RoutingRule,
}

impl Router {
    /// `weight: (n, d_model)`; `bias: (n)` is added to the logits, `correction: (n)` to the scores
    /// for the choice only (`e_score_correction_bias`).
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape),
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite), or
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when top-k is 0 or above `n` or the
    /// routing groups do not fit.
    pub fn new(
        weight: Array2<f32>,
        bias: Option<Array1<f32>>,
        correction: Option<Array1<f32>>,
        rule: RoutingRule,
    ) -> Result<Self> {
        let n = weight.nrows();
        weight.check_finite("router weight")?;
        for (vector, what) in [(&bias, "router bias"), (&correction, "router correction bias")] {
            let Some(vector) = vector else { continue };
            if vector.len() != n {
                return Err(Error::shape("router bias", n, vector.len()));
            }
            vector.check_finite(what)?;
        }
        if rule.top_k == 0 || rule.top_k > n {
            return Err(Error::range("experts per token (top-k)", format!("1..={n}"), rule.top_k));
        }
        if !rule.scale.is_finite() {
            return Err(Error::range("routed scaling factor", "a finite number", rule.scale));
        }
        if let Some(misfit) = rule.groups.and_then(|g| g.misfit(n, rule.top_k)) {
            return Err(Error::range("routing groups", "an even split", misfit));
        }
        Ok(Self { weight, bias, correction, rule })
    }

    /// Number of experts it routes to.
    pub fn experts(&self) -> usize {
        self.weight.nrows()
    }

    /// `W: (n, d_model)`.
    pub fn weight(&self) -> ArrayView2<'_, f32> {
        self.weight.view()
    }

    /// The bias of the logits.
    pub fn bias(&self) -> Option<&Array1<f32>> {
        self.bias.as_ref()
    }

    /// The correction bias of the choice.
    pub fn correction(&self) -> Option<&Array1<f32>> {
        self.correction.as_ref()
    }

    /// The routing policy.
    pub fn rule(&self) -> &RoutingRule {
        &self.rule
    }

    /// `Z = X Wᵀ + b` for `X: (t, d_model)`: `(t, n)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn logits(&self, x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Array2<f32>> {
        let mut logits = Array2::zeros((x.nrows(), self.experts()));
        compute.gemm(1.0, x, self.weight.t(), 0.0, logits.view_mut())?;
        if let Some(bias) = &self.bias {
            logits += bias;
        }
        Ok(logits)
    }

    /// Chooses experts for every row of `logits: (t, n)`, in parallel blocks of rows. Ties go to
    /// the smaller index.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when there is not one logit per expert.
    pub fn route(&self, logits: ArrayView2<'_, f32>) -> Result<Routing> {
        const ROWS: usize = 64;
        if logits.ncols() != self.experts() {
            return Err(Error::shape("routing", self.experts(), logits.ncols()));
        }
        let (t, k) = (logits.nrows(), self.rule.top_k);
        let blocks: Vec<_> = logits.axis_chunks_iter(Axis(0), ROWS).collect();
        let chosen = par::map(blocks.len(), |i| {
            Ok(blocks[i].rows().into_iter().map(|z| self.choose(&z.to_vec())).collect::<Vec<_>>())
        })?;
        let (mut experts, mut weights) = (Array2::zeros((t, k)), Array2::zeros((t, k)));
        for (row, chosen) in chosen.into_iter().flatten().enumerate() {
            for (slot, (e, w)) in chosen.into_iter().enumerate() {
                (experts[[row, slot]], weights[[row, slot]]) = (e as u32, w);
            }
        }
        Ok(Routing { experts, weights })
    }

    fn choose(&self, logits: &[f32]) -> Vec<(usize, f32)> {
        let RoutingRule { score, top_k, renormalise, scale, groups } = self.rule;
        let scores = match score {
            Score::Softmax => softmax(logits),
            Score::Sigmoid => logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
            Score::SoftmaxOfTopK => logits.to_vec(),
        };
        let mut rank = scores.clone();
        if let Some(correction) = &self.correction {
            rank.iter_mut().zip(correction).for_each(|(r, c)| *r += c);
        }
        // A logit of −∞ marks a dropped expert, which no correction may bring back.
        let dropped = |(r, &z): (&mut f32, &f32)| {
            if z == f32::NEG_INFINITY {
                *r = z;
            }
        };
        rank.iter_mut().zip(logits).for_each(dropped);
        if let Some(groups) = groups {
            mask_groups(&mut rank, groups);
        }
        let chosen = top(&rank, top_k);
        let mut weights: Vec<f32> = chosen.iter().map(|&e| scores[e]).collect();
        if score == Score::SoftmaxOfTopK {
            weights = softmax(&weights);
        }
        if renormalise {
            // The reference classes add 1e-20; an all-zero row must not become NaN.
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        chosen.into_iter().zip(weights.into_iter().map(|w| w * scale)).collect()
    }

    /// Keeps the rows `keep`, in that order; the policy is `rule`.
    ///
    /// # Errors
    /// As [`Router::new`]; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a row that
    /// does not exist.
    pub fn select(&self, keep: &[usize], rule: RoutingRule) -> Result<Self> {
        if let Some(&bad) = keep.iter().find(|&&i| i >= self.experts()) {
            return Err(Error::range("router row", format!("below {}", self.experts()), bad));
        }
        let pick = |v: &Array1<f32>| v.select(Axis(0), keep);
        Self::new(
            self.weight.select(Axis(0), keep),
            self.bias.as_ref().map(pick),
            self.correction.as_ref().map(pick),
            rule,
        )
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f32> = logits.iter().map(|z| (z - max).exp()).collect();
    let sum: f32 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

/// Indices of the `k` largest values, best first, ties to the smaller index.
fn top(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let by_value = |&a: &usize, &b: &usize| values[b].total_cmp(&values[a]).then(a.cmp(&b));
    if k < order.len() {
        order.select_nth_unstable_by(k, by_value);
        order.truncate(k);
    }
    order.sort_unstable_by(by_value);
    order
}

fn mask_groups(rank: &mut [f32], groups: RoutingGroups) {
    let size = rank.len() / groups.groups;
    let score = |block: &[f32]| {
        let best = top(block, 2.min(block.len()));
        match groups.score {
            GroupScore::Max => block[best[0]],
            GroupScore::TopTwoSum => best.iter().map(|&i| block[i]).sum(),
        }
    };
    let scores: Vec<f32> = rank.chunks(size).map(score).collect();
    let kept = top(&scores, groups.chosen);
    for (g, block) in rank.chunks_mut(size).enumerate() {
        if !kept.contains(&g) {
            block.fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn router(rule: RoutingRule, correction: Option<Array1<f32>>) -> Router {
        Router::new(Array2::eye(4), None, correction, rule).unwrap()
    }

    #[test]
    fn softmax_top_two_renormalised() {
        let z = array![[0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()]];
        let plain = router(RoutingRule::softmax(2, false), None).route(z.view()).unwrap();
        assert_eq!(plain.experts, array![[3, 1]]);
        approx::assert_abs_diff_eq!(plain.weights, array![[0.5, 0.25]], epsilon = 1e-6);
        let normed = router(RoutingRule::softmax(2, true), None).route(z.view()).unwrap();
        approx::assert_abs_diff_eq!(normed.weights, array![[2.0 / 3.0, 1.0 / 3.0]], epsilon = 1e-6);
    }

    #[test]
    fn correction_changes_the_choice_but_not_the_weight() {
        let groups = Some(RoutingGroups { groups: 2, chosen: 1, score: GroupScore::TopTwoSum });
        let rule =
            RoutingRule { score: Score::Sigmoid, top_k: 1, renormalise: false, scale: 2.5, groups };
        let router = router(rule, Some(array![0.0, 0.9, 0.0, 0.0]));
        let routing = router.route(array![[0.0, -1.0, 1.0, -9.0]].view()).unwrap();
        assert_eq!(routing.experts, array![[1]]);
        let weight = 2.5 / (1.0 + 1.0f32.exp());
        approx::assert_abs_diff_eq!(routing.weights, array![[weight]], epsilon = 1e-6);
    }

    #[test]
    fn ties_go_to_the_smaller_index() {
        let routing =
            router(RoutingRule::softmax(2, true), None).route(Array2::zeros((1, 4)).view());
        assert_eq!(routing.unwrap().experts, array![[0, 1]]);
    }

    #[test]
    fn impossible_policies_are_refused() {
        let with = |rule| Router::new(Array2::eye(4), None, None, rule).unwrap_err().to_string();
        assert!(with(RoutingRule::softmax(5, true)).contains("expected 1..=4, found 5"));
        let groups = Some(RoutingGroups { groups: 3, chosen: 1, score: GroupScore::Max });
        assert!(
            with(RoutingRule { groups, ..RoutingRule::softmax(1, true) }).contains("3 routing")
        );
    }
}
