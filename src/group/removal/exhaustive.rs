//! Exhaustive search over subsets of experts, for layers with few of them.

use super::Removal;
use super::path::{alone, grouping};
use super::probe::Probe;
use crate::error::Result;
use crate::model::{Budget, Grouping, LayerId};
use crate::par;
use crate::stage::Candidate;

/// The best subset of every size, from `least` to all; `None` when there are more subsets than the
/// method may try.
pub(super) fn subsets(
    method: &Removal,
    probe: &Probe<'_>,
    (id, budget): (LayerId, &Budget),
    least: usize,
) -> Result<Option<Vec<Candidate>>> {
    let n = probe.outputs.len();
    let alone = alone(method, probe, (id, budget));
    let free: Vec<usize> = (0..n).filter(|i| !alone.contains(i)).collect();
    if free.len() >= usize::BITS as usize - 1 || (1usize << free.len()) > method.exhaustive {
        return Ok(None);
    }
    let least = least.max(alone.len());
    let kept = |set: usize| {
        let stays = |i: usize| match free.iter().position(|&f| f == i) {
            Some(bit) => set >> bit & 1 == 1,
            None => true,
        };
        (0..n).map(|i| Some(i).filter(|&i| stays(i))).collect::<Vec<_>>()
    };
    let size = |set: usize| alone.len() + set.count_ones() as usize;
    let sets: Vec<usize> =
        (0..1usize << free.len()).filter(|&set| (least.max(1)..n).contains(&size(set))).collect();
    let tokens: Vec<usize> = (0..probe.tokens()).collect();
    let losses = par::map(sets.len(), |s| {
        let visits = probe.route(&tokens, &kept(sets[s]))?;
        let mut scratch = vec![0.0; probe.target.ncols()];
        let each = visits.iter().enumerate();
        Ok(each.map(|(t, v)| probe.missed(t, v, &mut scratch)).sum::<f64>())
    })?;
    let energy = probe.energy(tokens.iter().copied());
    let mut found = Vec::new();
    for m in least.max(1)..n {
        let of_size = (0..sets.len()).filter(|&s| size(sets[s]) == m);
        // The first of equals: the one that keeps the smaller experts.
        let best = of_size.min_by(|&a, &b| losses[a].total_cmp(&losses[b]));
        if let Some(s) = best {
            let grouping = grouping(&kept(sets[s]))?;
            found.push(Candidate { grouping, error: losses[s] / energy });
        }
    }
    found.push(Candidate { grouping: Grouping::identity(n), error: 0.0 });
    Ok(Some(found))
}
