//! Task-specific pruning: drops experts that a task hardly uses.

use serde::{Deserialize, Serialize};

use super::prune::keep_only;
use super::quota::{Quota, Rest, Spread};
use super::ranking::{LayerScale, Ranking};
use crate::error::{Error, Locate, Result};
use crate::model::{Budget, Grouping, Importance, LayerId};
use crate::par;
use crate::stage::{Context, Grouper, LayerSummary, Stage};

/// Task-specific expert pruning, a baseline of M-SMoE (arXiv 2310.01334, §4).
///
/// Among the experts that are alive, those with a usage `u_i > β / alive` survive, where `u` sums
/// to 1 over the living; usage is renormalised and the filter repeated until none dies. Where fewer
/// than the minimum would survive, the most used up to the minimum do. The final call keeps the
/// most used up to the budget; the others are dropped. Cost: `O(n²)` per layer.
///
/// *Deviations.* The authors prune during fine-tuning, on a running mean of the usage
/// ([`UsageTracker`]); here the filter runs on the statistics of the original model, so within a
/// layer the result is that of its final call, whatever `β` is. What the filter adds is a
/// comparison of layers: under [`Spread::Global`] a layer's minimum is its least number of groups,
/// and the places beyond go to the survivors with the largest renormalised usage, before any that
/// did not survive. The code
/// multiplies the router logits of dead experts by a large negative number, which makes winners of
/// those with negative logits; a dropped expert here cannot be chosen at all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskSpecific {
    /// The share of the mean usage below which an expert is dropped: 0 or more.
    pub beta: f64,
    /// Whether layers compete for the budget.
    pub spread: Spread,
}

impl Default for TaskSpecific {
    /// `β = 0.1`, as the authors; the same number of experts in every layer.
    fn default() -> Self {
        Self { beta: 0.1, spread: Spread::Uniform }
    }
}

impl TaskSpecific {
    /// The experts that survive the filter, and at least the `minimum` most used ones: their usage
    /// renormalised to a sum of 1; 0 for the dead.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a negative or non-finite `beta`
    /// or usage.
    pub fn filter(&self, usage: &[f64], minimum: usize) -> Result<Vec<f64>> {
        if !self.beta.is_finite() || self.beta < 0.0 {
            return Err(Error::range("beta of task-specific pruning", "0 or more", self.beta));
        }
        check_usage(usage)?;
        let mut order: Vec<usize> = (0..usage.len()).collect();
        order.sort_by(|&a, &b| usage[b].total_cmp(&usage[a]));
        let mut alive = order.len();
        loop {
            let total: f64 = order[..alive].iter().map(|&i| usage[i]).sum();
            let bar = self.beta / alive.max(1) as f64 * total;
            let left = order[..alive].iter().filter(|&&i| usage[i] > bar).count().max(minimum);
            if left >= alive {
                let mut share = vec![0.0; usage.len()];
                let of = |u: f64| if total > 0.0 { u / total } else { 1.0 / alive as f64 };
                order[..alive].iter().for_each(|&i| share[i] = of(usage[i]));
                return Ok(share);
            }
            alive = left;
        }
    }
}

impl Stage for TaskSpecific {
    fn name(&self) -> &str {
        "task-specific"
    }
}

impl Grouper for TaskSpecific {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        _cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let quota = Quota::new(layers, budget, self.spread, Rest::Drops)?;
        let ranking = Ranking::new(layers, budget, Importance::Frequency, LayerScale::None)?;
        let shares = par::map(layers.len(), |l| {
            self.filter(&ranking.scores[l], quota.least[l]).in_layer(layers[l].id)
        })?;
        let kept = quota.allot(&shares, &ranking.order);
        par::map(layers.len(), |l| keep_only(&ranking.order[l], kept[l]).in_layer(layers[l].id))
    }

    fn counts(&self, layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>> {
        Quota::known(layers, budget, self.spread, Rest::Drops)
    }
}

/// A running mean of the usage of a layer's experts, for pruning while a model trains.
///
/// Starts uniform; the first batch replaces it; from then on `u ← β u + (1 − β) u_batch`. `u` sums
/// to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct UsageTracker {
    usage: Vec<f64>,
    decay: f64,
    fresh: bool,
}

impl UsageTracker {
    /// For `n` experts; `decay` is the `β` of the mean (0.9 by the authors).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for no expert, or a decay outside
    /// 0 to 1.
    pub fn new(n: usize, decay: f64) -> Result<Self> {
        if n == 0 {
            return Err(Error::range("experts of a usage tracker", "1 or more", n));
        }
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::range("decay of a usage tracker", "0 to 1", decay));
        }
        Ok(Self { usage: vec![1.0 / n as f64; n], decay, fresh: true })
    }

    /// The usage so far: `(n)`, sums to 1.
    pub fn usage(&self) -> &[f64] {
        &self.usage
    }

    /// Takes in the usage, or the counts, of a batch and returns `Σ |change|`. A batch without
    /// tokens changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) for another number of experts,
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a negative or non-finite usage.
    pub fn update(&mut self, batch: &[f64]) -> Result<f64> {
        if batch.len() != self.usage.len() {
            return Err(Error::shape("usage of a batch", self.usage.len(), batch.len()));
        }
        check_usage(batch)?;
        let seen: f64 = batch.iter().sum();
        if seen == 0.0 {
            return Ok(0.0);
        }
        let decay = if self.fresh { 0.0 } else { self.decay };
        let mix = |(u, b): (&f64, &f64)| decay * u + (1.0 - decay) * b / seen;
        let mut next: Vec<f64> = self.usage.iter().zip(batch).map(mix).collect();
        let total: f64 = next.iter().sum();
        next.iter_mut().for_each(|u| *u /= total);
        let change = next.iter().zip(&self.usage).map(|(a, b)| (a - b).abs()).sum();
        (self.usage, self.fresh) = (next, false);
        Ok(change)
    }
}

fn check_usage(usage: &[f64]) -> Result<()> {
    match usage.iter().find(|u| !u.is_finite() || **u < 0.0) {
        None => Ok(()),
        Some(u) => Err(Error::range("usage", "0 or more", u)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_repeats_until_none_dies() {
        let filter = |beta| TaskSpecific { beta, spread: Spread::Uniform };
        // 0.5 of a mean of 0.25 lets 0.14 live; without 0.06 the bar rises to 0.157.
        let usage = [14.0, 50.0, 6.0, 30.0];
        assert_eq!(filter(0.5).filter(&usage, 1).unwrap(), [0.0, 0.625, 0.0, 0.375]);
        assert_eq!(filter(0.0).filter(&usage, 1).unwrap(), [0.14, 0.5, 0.06, 0.3]);
        let three = filter(0.5).filter(&usage, 3).unwrap();
        assert!(three[0] > 0.0 && three[2] == 0.0);
        assert!(filter(f64::NAN).filter(&usage, 1).is_err());
        assert!(filter(-1.0).filter(&usage, 1).is_err());
    }

    #[test]
    fn a_layer_without_any_use_keeps_its_minimum() {
        let share = TaskSpecific::default().filter(&[0.0; 4], 2).unwrap();
        assert_eq!(share, [0.5, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn the_tracker_replaces_then_averages() {
        let mut tracker = UsageTracker::new(2, 0.75).unwrap();
        assert_eq!(tracker.usage(), [0.5, 0.5]);
        assert_eq!(tracker.update(&[0.0, 8.0]).unwrap(), 1.0);
        assert_eq!(tracker.usage(), [0.0, 1.0]);
        assert_eq!(tracker.update(&[0.0, 0.0]).unwrap(), 0.0);
        assert_eq!(tracker.update(&[1.0, 0.0]).unwrap(), 0.5);
        assert_eq!(tracker.usage(), [0.25, 0.75]);
        assert!(tracker.update(&[1.0]).is_err());
        assert!(tracker.update(&[-1.0, 2.0]).is_err());
        assert!(UsageTracker::new(0, 0.5).is_err() && UsageTracker::new(2, 1.5).is_err());
    }
}
