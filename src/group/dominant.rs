//! The paper's grouping: each other expert joins the most similar dominant expert.

use serde::{Deserialize, Serialize};

use super::quota::{Quota, Rest, Spread};
use super::ranking::{LayerScale, Ranking, join_most_similar, needs_of};
use crate::error::{Locate, Result};
use crate::model::{Budget, Grouping, Importance, LayerId};
use crate::par;
use crate::stage::{Context, Grouper, LayerSummary, Needs, Stage};

/// Routing-guided grouping (M-SMoE, arXiv 2310.01334, §3.2).
///
/// The most important expert of every layer is dominant; the remaining places go to the most
/// important experts of all layers, `u_{l,i} = c_{l,i} / Σ_j c_{l,j}` compared across layers, until
/// exactly the budget is used. A layer with balanced routing so keeps many experts, one with
/// concentrated routing few. The others, in descending order of importance, join the dominant
/// expert of their layer that is most similar to them: `argmax_d S_{i,d}`.
///
/// With [`Spread::Uniform`] every layer gets the same number of dominant experts. Cost:
/// `O(n log n)` over all experts for the choice, `O(n m)` per layer for the assignment.
///
/// *Deviations from the authors' code.* The budget is met exactly: the code takes what lies
/// strictly above a threshold, so ties cost groups, and a budget of all experts still merges one.
/// Its per-layer variant for Switch leaves non-dominant experts of an index below `m` in the group
/// of that number; here every one goes to the most similar dominant. A full group is skipped, and
/// only a group that would exceed the capacity is full. Protected experts are dominant and stay
/// alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dominant {
    /// What makes an expert dominant.
    pub importance: Importance,
    /// Whether layers compete for the budget.
    pub spread: Spread,
    /// How scores are compared when they do.
    pub scale: LayerScale,
}

impl Default for Dominant {
    /// The paper's choice: by frequency, over all layers, compared as in the authors' code.
    fn default() -> Self {
        Self { importance: Importance::Frequency, spread: Spread::Global, scale: LayerScale::None }
    }
}

impl Stage for Dominant {
    fn name(&self) -> &str {
        "dominant"
    }

    fn needs(&self) -> Needs {
        needs_of(self.importance)
    }
}

impl Grouper for Dominant {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        _cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let quota = Quota::new(layers, budget, self.spread, Rest::Joins)?;
        let Ranking { scores, order } = Ranking::new(layers, budget, self.importance, self.scale)?;
        let kept = quota.allot(&scores, &order);
        par::map(layers.len(), |l| {
            join_most_similar(&layers[l], budget, &order[l], kept[l]).in_layer(layers[l].id)
        })
    }

    fn counts(&self, layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>> {
        Quota::known(layers, budget, self.spread, Rest::Joins)
    }
}
