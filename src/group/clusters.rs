//! Conversion of sets of experts to a grouping.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::{Budget, Grouping, Numbering};
use crate::stage::LayerSummary;

/// Which member of a group is its dominant expert, where the method itself has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Representative {
    /// The most used; ties go to the smaller index.
    #[default]
    MostUsed,
    /// The one with the smallest sum of distances to the others; ties go to the smaller index.
    Medoid,
}

impl Representative {
    /// The dominant expert of `members`, which ascend.
    fn of(self, members: &[usize], layer: &LayerSummary) -> usize {
        let counts = &layer.stats.counts;
        let distance = layer.similarity.distances();
        let better = |a: usize, b: usize| match self {
            Self::MostUsed => counts[a] > counts[b],
            Self::Medoid => {
                let sum = |i: usize| members.iter().map(|&j| distance[[i, j]]).sum::<f64>();
                sum(a) < sum(b)
            }
        };
        members
            .iter()
            .copied()
            .reduce(|best, i| if better(i, best) { i } else { best })
            .unwrap_or(0)
    }
}

/// The grouping of disjoint clusters, with every protected expert alone.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when a cluster is empty.
pub(super) fn grouping(
    layer: &LayerSummary,
    budget: &Budget,
    mut clusters: Vec<Vec<usize>>,
    representative: Representative,
) -> Result<Grouping> {
    if let Some(protected) = budget.protected.get(&layer.id) {
        clusters.extend(protected.iter().map(|&i| vec![i]));
    }
    let mut label = vec![None; layer.experts()];
    let mut dominant = Vec::with_capacity(clusters.len());
    for (g, members) in clusters.iter_mut().enumerate() {
        members.sort_unstable();
        members.iter().for_each(|&i| label[i] = Some(g));
        dominant.push(representative.of(members, layer));
    }
    Ok(Grouping::new(label, dominant)?.renumbered(Numbering::ByDominant))
}
