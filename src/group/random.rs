//! Random groups: a baseline.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::clusters::{Representative, grouping};
use super::quota::{Quota, Rest, Spread, free};
use crate::error::{Locate, Result};
use crate::model::{Budget, Grouping, LayerId};
use crate::par;
use crate::stage::{Context, Grouper, LayerSummary, Stage};

/// Random groups (baseline of M-SMoE, arXiv 2310.01334, §4): each of the `m` labels is used once,
/// the other `n − m` are drawn uniformly, and all are shuffled. Each layer draws from its own
/// stream of the context's seed. Cost: `O(n)` per layer, `O(n m)` under a group capacity.
///
/// *Deviations.* Full groups are not drawn. The dominant expert is the most used of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomGroups {
    /// Which member is the dominant expert.
    pub representative: Representative,
}

impl Stage for RandomGroups {
    fn name(&self) -> &str {
        "random"
    }
}

impl Grouper for RandomGroups {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let quota = Quota::new(layers, budget, Spread::Uniform, Rest::Joins)?;
        par::map(layers.len(), |l| {
            let layer = &layers[l];
            let mut rng = layer.id.random_numbers(cx.seed());
            let experts = free(layer, budget);
            let groups = quota.least[l] - budget.protected_in(layer.id);
            let capacity = budget.group_capacity.unwrap_or(usize::MAX);
            let clusters = draw(experts, groups, capacity, &mut rng);
            grouping(layer, budget, clusters, self.representative).in_layer(layer.id)
        })
    }

    fn counts(&self, layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>> {
        Quota::known(layers, budget, Spread::Uniform, Rest::Joins)
    }
}

/// Shuffles the experts, gives the first `groups` one label each and draws the others' labels.
/// The capacity is known to suffice.
fn draw(
    mut experts: Vec<usize>,
    groups: usize,
    capacity: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Vec<usize>> {
    experts.shuffle(rng);
    let rest = experts.split_off(groups.min(experts.len()));
    let mut clusters: Vec<Vec<usize>> = experts.into_iter().map(|i| vec![i]).collect();
    for i in rest {
        let open: Vec<usize> =
            (0..clusters.len()).filter(|&g| clusters[g].len() < capacity).collect();
        if !open.is_empty() {
            clusters[open[rng.random_range(0..open.len())]].push(i);
        }
    }
    clusters
}
