//! The number of groups of each layer.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Budget, LayerId, Target};
use crate::stage::LayerSummary;

/// How a budget over all layers is spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// Layers compete: one that routes evenly keeps more experts than one that does not (the
    /// paper's adaptive ratio, arXiv 2310.01334 §3.2). A [`Target::PerLayer`] leaves nothing to
    /// compete for and is met in every layer.
    Global,
    /// As even as the layers allow: counts differ by at most one, earlier layers first, except
    /// where a layer is too small or has to keep more.
    Uniform,
}

/// What happens to experts that are not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They join a group, which must exist and have room.
    Joins,
    /// They are dropped.
    Drops,
}

/// The groups that each layer gets at least, and how many more may go to any of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Quota {
    /// Per layer; the final counts when `extra` is 0.
    pub(super) least: Vec<usize>,
    /// To be spread over layers that have experts left.
    pub(super) extra: usize,
}

impl Quota {
    /// Checks a budget against the layers.
    ///
    /// # Errors
    /// [`ErrorKind::Budget`] with the reachable numbers, [`ErrorKind::Statistics`] when statistics
    /// and similarity of a layer count different experts.
    pub(super) fn new(
        layers: &[LayerSummary],
        budget: &Budget,
        spread: Spread,
        rest: Rest,
    ) -> Result<Self> {
        for layer in layers {
            let (counted, compared) = (layer.stats.experts(), layer.experts());
            if counted != compared {
                let reason = format!("{counted} experts were counted, {compared} compared");
                return Err(ErrorKind::Statistics { reason }.into()).in_layer(layer.id);
            }
        }
        let sizes: Vec<_> = layers.iter().map(|l| (l.id, l.experts())).collect();
        Self::of_sizes(&sizes, budget, spread, rest)
    }

    /// The final counts where they do not depend on the layers' scores.
    ///
    /// # Errors
    /// [`ErrorKind::Budget`] with the reachable numbers.
    pub(super) fn known(
        layers: &[(LayerId, usize)],
        budget: &Budget,
        spread: Spread,
        rest: Rest,
    ) -> Result<Option<Vec<usize>>> {
        let quota = Self::of_sizes(layers, budget, spread, rest)?;
        Ok((quota.extra == 0).then_some(quota.least))
    }

    fn of_sizes(
        layers: &[(LayerId, usize)],
        budget: &Budget,
        spread: Spread,
        rest: Rest,
    ) -> Result<Self> {
        let least = layers.iter().map(|l| least_groups(*l, budget, rest).in_layer(l.0));
        let least: Vec<usize> = least.collect::<Result<_>>()?;
        let total = match budget.target {
            Target::PerLayer(m) => return per_layer(layers, &least, m),
            Target::Total(total) => total,
        };
        let (low, high) = (least.iter().sum(), layers.iter().map(|l| l.1).sum());
        if !(low..=high).contains(&total) {
            let found = format!("{total} experts were asked for over {} layers", layers.len());
            return Err(unreachable(&found, low, high));
        }
        let extra = total - low;
        Ok(match spread {
            Spread::Global => Self { least, extra },
            Spread::Uniform => Self { least: fill_evenly(layers, least, extra), extra: 0 },
        })
    }

    /// The number of groups per layer when each extra one goes to the best candidate that is left.
    ///
    /// `order[l]` ranks the experts of layer `l`; its first `least[l]` are kept anyhow, the others
    /// compete by `scores[l]`. Ties: smaller expert, then earlier layer.
    pub(super) fn allot(&self, scores: &[Vec<f64>], order: &[Vec<usize>]) -> Vec<usize> {
        let mut counts = self.least.clone();
        let mut open: Vec<(f64, usize, usize)> = Vec::new();
        for (l, (scores, order)) in scores.iter().zip(order).enumerate() {
            open.extend(order[self.least[l]..].iter().map(|&i| (scores[i], i, l)));
        }
        open.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        open.iter().take(self.extra).for_each(|&(.., l)| counts[l] += 1);
        counts
    }
}

/// The experts of a layer that may share a group, ascending.
pub(super) fn free(layer: &LayerSummary, budget: &Budget) -> Vec<usize> {
    (0..layer.experts()).filter(|&i| !budget.is_protected(layer.id, i)).collect()
}

/// A [`ErrorKind::Budget`].
pub(super) fn budget_error(reason: impl Into<String>) -> Error {
    ErrorKind::Budget { reason: reason.into() }.into()
}

fn unreachable(found: &str, low: usize, high: usize) -> Error {
    budget_error(format!(
        "{found}, but {low} to {high} are reachable with this minimum per layer, these protected \
         experts and this group capacity"
    ))
}

/// The smallest number of groups that keeps every promise of the budget.
fn least_groups((id, n): (LayerId, usize), budget: &Budget, rest: Rest) -> Result<usize> {
    let protected = budget.protected.get(&id);
    if let Some(i) = protected.and_then(|experts| experts.iter().find(|&&i| i >= n)) {
        return Err(budget_error(format!("expert {i} is protected, but there are only {n}")));
    }
    let alone = budget.protected_in(id);
    let capacity = budget.group_capacity.unwrap_or(n.max(1));
    if capacity == 0 {
        return Err(budget_error("a group capacity of 0 leaves no room for any expert"));
    }
    let joined = if rest == Rest::Joins { (n - alone).div_ceil(capacity) } else { 0 };
    let minimum = budget.min_per_layer.max(1);
    if minimum > n {
        return Err(budget_error(format!("at least {minimum} groups for {n} experts")));
    }
    Ok(minimum.max(alone + joined))
}

fn per_layer(layers: &[(LayerId, usize)], least: &[usize], m: usize) -> Result<Quota> {
    for (&(id, n), &low) in layers.iter().zip(least) {
        if !(low..=n).contains(&m) {
            let found = format!("{m} experts were asked for");
            return Err(unreachable(&found, low, n)).in_layer(id);
        }
    }
    Ok(Quota { least: vec![m; layers.len()], extra: 0 })
}

/// Raises the lowest counts first; earlier layers win ties, full layers are passed over.
fn fill_evenly(layers: &[(LayerId, usize)], mut counts: Vec<usize>, extra: usize) -> Vec<usize> {
    for _ in 0..extra {
        let open = (0..counts.len()).filter(|&l| counts[l] < layers[l].1);
        if let Some(l) = open.min_by_key(|&l| counts[l]) {
            counts[l] += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{RoutingStats, SimilarityMatrix};
    use ndarray::Array2;

    fn layers(sizes: &[usize]) -> Vec<LayerSummary> {
        let layer = |(index, &n): (usize, &usize)| LayerSummary {
            id: LayerId::causal(index),
            similarity: SimilarityMatrix::from_similarities(Array2::eye(n)).unwrap(),
            stats: RoutingStats::from_counts(vec![1; n], n as u64),
            candidates: None,
        };
        sizes.iter().enumerate().map(layer).collect()
    }

    fn quota(sizes: &[usize], budget: &Budget, spread: Spread) -> Result<Quota> {
        Quota::new(&layers(sizes), budget, spread, Rest::Joins)
    }

    #[test]
    fn even_spread_prefers_early_layers_and_skips_full_ones() {
        let budget = Budget::new(Target::Total(11));
        let even = quota(&[2, 8, 8], &budget, Spread::Uniform).unwrap();
        assert_eq!(even, Quota { least: vec![2, 5, 4], extra: 0 });
        let shared = quota(&[2, 8, 8], &budget, Spread::Global).unwrap();
        assert_eq!(shared, Quota { least: vec![1, 1, 1], extra: 8 });
    }

    #[test]
    fn errors_name_what_can_be_reached() {
        let reason = |budget: &Budget| quota(&[4, 6], budget, Spread::Global).unwrap_err();
        let of = |target| Budget::new(target);
        assert!(reason(&of(Target::Total(1))).to_string().contains("2 to 10 are reachable"));
        assert!(reason(&of(Target::Total(11))).to_string().contains("2 to 10 are reachable"));
        let above = reason(&of(Target::PerLayer(5))).to_string();
        assert!(above.starts_with("layers.0: ") && above.contains("1 to 4"), "{above}");
        let mut budget = of(Target::PerLayer(2));
        budget.protected.insert(LayerId::causal(1), [0, 5].into());
        assert!(reason(&budget).to_string().contains("3 to 6"), "{}", reason(&budget));
        budget.protected.insert(LayerId::causal(1), [6].into());
        assert!(reason(&budget).to_string().contains("expert 6 is protected"));
        let capped = Budget { group_capacity: Some(2), ..of(Target::PerLayer(2)) };
        assert!(reason(&capped).to_string().contains("3 to 6"));
        let none = Budget { group_capacity: Some(0), ..of(Target::PerLayer(2)) };
        assert!(matches!(reason(&none).kind(), ErrorKind::Budget { .. }));
        let least = Budget { min_per_layer: 5, ..of(Target::Total(9)) };
        assert!(reason(&least).to_string().contains("at least 5 groups for 4 experts"));
    }

    #[test]
    fn statistics_of_another_layer_are_refused() {
        let mut layers = layers(&[4]);
        layers[0].stats = RoutingStats::from_counts(vec![1; 3], 3);
        let budget = Budget::new(Target::PerLayer(2));
        let failure = Quota::new(&layers, &budget, Spread::Uniform, Rest::Drops).unwrap_err();
        assert!(matches!(failure.kind(), ErrorKind::Statistics { .. }));
    }

    #[test]
    fn extra_groups_go_to_the_best_then_the_smaller_expert_then_the_earlier_layer() {
        let scores = [vec![0.5, 0.25, 0.25], vec![0.25, 0.5, 0.25]];
        let order = [vec![0, 1, 2], vec![1, 0, 2]];
        let counts = |extra| Quota { least: vec![1, 1], extra }.allot(&scores, &order);
        assert_eq!(counts(1), [1, 2]); // expert 0 of layer 1 before expert 1 of layer 0
        assert_eq!(counts(2), [2, 2]);
        assert_eq!(counts(3), [3, 2]); // expert 2 twice: the earlier layer
    }
}
