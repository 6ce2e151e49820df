//! Weighted averages of the aligned members.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Expert, Importance, LayerId};
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// What a member counts for in a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// Activation frequency `u_i` (M-SMoE).
    #[default]
    Usage,
    /// The same for every member.
    Uniform,
    /// Another measure of importance, e.g. REAP saliency.
    Saliency(Importance),
    /// `1 − u_i`: an ablation.
    ReversedUsage,
    /// `U[0, 1)` by seed, layer and expert: an ablation.
    Random,
}

impl Weighting {
    /// What it reads.
    pub fn needs(self) -> Needs {
        match self {
            Self::Saliency(Importance::RouterMass) => Needs::ROUTER_MASS,
            Self::Saliency(Importance::OutputNorm) => Needs::OUTPUT_NORM,
            Self::Saliency(Importance::Reap) => Needs::REAP,
            _ => Needs::NONE,
        }
    }

    /// The weight of each member, not normalised.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`](crate::ErrorKind::Missing) when the statistics lack the saliency,
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when they are of a smaller layer.
    pub fn weights(self, members: &Members<'_>, cx: &Context) -> Result<Vec<f64>> {
        let stats = members.layer.stats;
        match self {
            Self::Usage => members.pick(&stats.usage()),
            Self::Uniform => Ok(vec![1.0; members.indices.len()]),
            Self::Saliency(importance) => members.pick(&importance.of(stats)?),
            Self::ReversedUsage => {
                members.pick(&stats.usage().iter().map(|u| 1.0 - u).collect::<Vec<_>>())
            }
            Self::Random => members.pick(&random(members.layer.id, members.layer.len(), cx.seed())),
        }
    }

    /// The weights, normalised to sum to 1; equal when they sum to 0.
    ///
    /// # Errors
    /// As [`weights`](Self::weights); [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for
    /// a negative or non-finite weight.
    pub fn shares(self, members: &Members<'_>, cx: &Context) -> Result<Vec<f64>> {
        normalised(&self.weights(members, cx)?)
    }
}

/// `w / Σ w`, or equal shares when the sum is 0.
pub(super) fn normalised(weights: &[f64]) -> Result<Vec<f64>> {
    if let Some(w) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
        return Err(Error::range("merge weight", "0 or more", w));
    }
    let total: f64 = weights.iter().sum();
    let equal = 1.0 / weights.len() as f64;
    Ok(weights.iter().map(|w| if total > 0.0 { w / total } else { equal }).collect())
}

/// One number per expert of a layer, whatever its group.
fn random(id: LayerId, experts: usize, seed: u64) -> Vec<f64> {
    let mut rng = id.random_numbers(seed);
    (0..experts).map(|_| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64).collect()
}

/// The published code's normalisation: `Σ w W / (Σ w + eps)`.
///
/// It shrinks every merged expert, groups of one included, by `Σ w / (Σ w + eps)`; a group that no
/// token visited becomes zero. Use it to reproduce published checkpoints, not to make new ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceCompat {
    /// Added to the sum of the weights.
    pub eps: f64,
}

impl Default for ReferenceCompat {
    /// `1e-7`, as for Switch and Mixtral (the fairseq models use `1e-3`).
    fn default() -> Self {
        Self { eps: 1e-7 }
    }
}

impl ReferenceCompat {
    pub(super) fn check(self) -> Result<f64> {
        match self.eps.is_finite() && self.eps >= 0.0 {
            true => Ok(self.eps),
            false => Err(Error::range("reference eps", "0 or more", self.eps)),
        }
    }
}

/// `W' = Σ_i w_i P_i(W_i) / Σ_i w_i` for every matrix and bias: the merge of M-SMoE when the
/// weights are activation frequencies.
///
/// Cost: one pass over the members' weights, `O(K d f)` for `K` members; memory of one expert.
///
/// Source: M-SMoE (arXiv 2310.01334, §3.2). *Deviations:* normalised exactly where the published
/// code adds `1e-7` to the sum ([`ReferenceCompat`] restores that), and a group that no token
/// visited is averaged with equal weights instead of becoming zero.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weighted {
    /// What a member counts for.
    pub by: Weighting,
    /// The published code's normalisation instead of the exact one.
    pub compat: Option<ReferenceCompat>,
}

impl Weighted {
    /// An exactly normalised average.
    pub fn new(by: Weighting) -> Self {
        Self { by, compat: None }
    }

    /// The average of the published code.
    pub fn reference(by: Weighting) -> Self {
        Self { by, compat: Some(ReferenceCompat::default()) }
    }
}

impl Stage for Weighted {
    fn name(&self) -> &str {
        match self.by {
            Weighting::Usage => "usage-weighted",
            Weighting::Uniform => "average",
            Weighting::Saliency(_) => "saliency-weighted",
            Weighting::ReversedUsage => "reversed-usage-weighted",
            Weighting::Random => "random-weighted",
        }
    }

    fn needs(&self) -> Needs {
        self.by.needs()
    }
}

impl Merger for Weighted {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        let weights = self.by.weights(members, cx)?;
        let Some(compat) = self.compat else { return members.average(&weights, cx) };
        let total = weights.iter().sum::<f64>() + compat.check()?;
        // With eps = 0 an unvisited group has no average at all.
        if total <= 0.0 {
            return Err(Error::range("sum of merge weights and eps", "more than 0", total));
        }
        let parts = weights.iter().zip(members.experts).zip(members.permutations);
        let terms: Vec<_> = parts.map(|((w, &e), p)| ((w / total) as f32, e, p)).collect();
        Expert::weighted_sum(&terms, cx.compute())
    }
}
