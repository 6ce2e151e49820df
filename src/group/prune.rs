//! Pruning: the best experts are kept unchanged.

use serde::{Deserialize, Serialize};

use super::quota::{Quota, Rest, Spread};
use super::ranking::{LayerScale, Ranking, join_most_similar, needs_of};
use crate::error::{Locate, Result};
use crate::model::{Budget, Grouping, Importance, LayerId, Numbering};
use crate::par;
use crate::stage::{Context, Grouper, LayerSummary, Needs, Stage};

/// The treatment of a pruned expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Absorb {
    /// The router can no longer choose it.
    #[default]
    Drop,
    /// Its tokens visit the most similar expert that stays. Use it with a merger that takes the
    /// dominant expert as it is; any other makes a merge of it.
    Redirect,
}

/// Keeps the experts of the highest score in every layer.
///
/// Scores: activation frequency, router mass, EAN (mean output norm) or REAP (mean of router weight
/// times output norm, arXiv 2510.13999). `Absorb::Redirect` is the "replace" baseline of M-SMoE
/// (arXiv 2310.01334). Cost: `O(n log n)` over all experts.
///
/// *Deviations.* REAP's code prunes `⌊n · ratio⌋` experts of each layer; here the number to keep is
/// given, and layers may compete for it. Scores of different layers are then compared as they are
/// unless [`LayerScale::Max`] is chosen. Dropping knows no group capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prune {
    /// The score by which experts are kept.
    pub importance: Importance,
    /// Whether pruned experts are dropped or redirected.
    pub absorb: Absorb,
    /// Whether layers compete for the budget.
    pub spread: Spread,
    /// How scores are compared when they do.
    pub scale: LayerScale,
}

impl Default for Prune {
    /// REAP as published: the same number everywhere, the others dropped.
    fn default() -> Self {
        Self {
            importance: Importance::Reap,
            absorb: Absorb::Drop,
            spread: Spread::Uniform,
            scale: LayerScale::None,
        }
    }
}

impl Stage for Prune {
    fn name(&self) -> &str {
        "prune"
    }

    fn needs(&self) -> Needs {
        needs_of(self.importance)
    }
}

impl Prune {
    fn rest(&self) -> Rest {
        if self.absorb == Absorb::Drop { Rest::Drops } else { Rest::Joins }
    }
}

impl Grouper for Prune {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        _cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let quota = Quota::new(layers, budget, self.spread, self.rest())?;
        let Ranking { scores, order } = Ranking::new(layers, budget, self.importance, self.scale)?;
        let kept = quota.allot(&scores, &order);
        par::map(layers.len(), |l| {
            let grouping = match self.absorb {
                Absorb::Drop => keep_only(&order[l], kept[l]),
                Absorb::Redirect => join_most_similar(&layers[l], budget, &order[l], kept[l]),
            };
            grouping.in_layer(layers[l].id)
        })
    }

    fn counts(&self, layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>> {
        Quota::known(layers, budget, self.spread, self.rest())
    }
}

/// The first `kept` experts of `order`, each alone; the others in no group.
pub(super) fn keep_only(order: &[usize], kept: usize) -> Result<Grouping> {
    let dominant = order[..kept.min(order.len())].to_vec();
    let mut label = vec![None; order.len()];
    dominant.iter().enumerate().for_each(|(g, &d)| label[d] = Some(g));
    Ok(Grouping::new(label, dominant)?.renumbered(Numbering::ByDominant))
}
