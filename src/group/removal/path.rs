//! Greedy removal of experts, one at a time, and the redirection of their tokens.

use std::collections::BTreeSet;

use super::probe::{Probe, Visits};
use super::refit::refit_error;
use super::{Removal, Rest};
use crate::error::Result;
use crate::model::{Budget, Grouping, LayerId, Numbering, SimilarityMatrix};
use crate::par;
use crate::stage::{Candidate, Context};

/// What may be done to expert `gone`: its tokens go `to` another, or it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Move {
    gone: usize,
    to: Option<usize>,
}

/// A move and what it leaves of the layer.
struct Tried {
    step: Move,
    /// The loss more than before, `Σ ‖t − y‖²`.
    loss: f64,
    tokens: Vec<usize>,
    visits: Vec<Visits>,
}

/// A layer on its way down.
pub(super) struct Path<'a> {
    method: &'a Removal,
    probe: &'a Probe<'a>,
    similarity: &'a SimilarityMatrix,
    /// Experts that stay, and stay alone.
    alone: BTreeSet<usize>,
    capacity: usize,
    map: Vec<Option<usize>>,
    visits: Vec<Visits>,
    /// `‖t − y‖²` of every token.
    missed: Vec<f64>,
}

impl<'a> Path<'a> {
    pub(super) fn new(
        method: &'a Removal,
        probe: &'a Probe<'a>,
        similarity: &'a SimilarityMatrix,
        (id, budget): (LayerId, &Budget),
    ) -> Self {
        let n = similarity.experts();
        Self {
            method,
            probe,
            similarity,
            alone: alone(method, probe, (id, budget)),
            capacity: budget.group_capacity.unwrap_or(n),
            map: (0..n).map(Some).collect(),
            visits: probe.start.clone(),
            missed: vec![0.0; probe.tokens()],
        }
    }

    /// The layer with every number of experts, from all of them to the least that is possible.
    pub(super) fn candidates(mut self, least: usize, cx: &Context) -> Result<Vec<Candidate>> {
        let n = self.map.len();
        let mut found = vec![Candidate { grouping: Grouping::identity(n), error: 0.0 }];
        for _ in least..n {
            let tried = self.best(self.tried()?, cx)?;
            let Some(tried) = tried else { break };
            self.take(tried);
            let error = self.error(&self.visits, &self.map, cx)?;
            found.push(Candidate { grouping: grouping(&self.map)?, error });
        }
        found.reverse();
        Ok(found)
    }

    /// Every move that the options allow, in a fixed order.
    fn moves(&self) -> Vec<Move> {
        let kept: Vec<usize> = self.kept();
        let mut moves = Vec::new();
        for &gone in kept.iter().filter(|i| !self.alone.contains(i)) {
            if self.method.rest != Rest::Redirect {
                moves.push(Move { gone, to: None });
            }
            if self.method.rest != Rest::Drop {
                let to = self.targets(gone, &kept).into_iter();
                moves.extend(to.map(|to| Move { gone, to: Some(to) }));
            }
        }
        moves
    }

    fn kept(&self) -> Vec<usize> {
        (0..self.map.len()).filter(|&i| self.map[i] == Some(i)).collect()
    }

    fn members(&self, e: usize) -> usize {
        self.map.iter().filter(|&&to| to == Some(e)).count()
    }

    /// The most similar experts that have room.
    fn targets(&self, gone: usize, kept: &[usize]) -> Vec<usize> {
        let table = self.similarity.similarities();
        let own = self.members(gone);
        let open = |&&e: &&usize| {
            e != gone && !self.alone.contains(&e) && self.members(e) + own <= self.capacity
        };
        let mut open: Vec<usize> = kept.iter().filter(open).copied().collect();
        open.sort_by(|&a, &b| table[[gone, b]].total_cmp(&table[[gone, a]]).then(a.cmp(&b)));
        open.truncate(self.method.targets.max(1));
        open
    }

    /// What every move would cost without a refit. Only tokens that visit the expert are touched.
    fn tried(&self) -> Result<Vec<Tried>> {
        let moves = self.moves();
        let width = self.probe.target.ncols();
        par::map(moves.len(), |m| {
            let step = moves[m];
            let visits = |t: &usize| self.visits[*t].iter().any(|(e, _)| *e == step.gone);
            let tokens: Vec<usize> = (0..self.probe.tokens()).filter(visits).collect();
            let after = self.probe.route(&tokens, &self.after(step))?;
            let mut scratch = vec![0.0; width];
            let pairs = tokens.iter().zip(&after);
            let loss = pairs
                .map(|(&t, v)| self.probe.missed(t, v, &mut scratch) - self.missed[t])
                .sum::<f64>();
            Ok(Tried { step, loss, tokens, visits: after })
        })
    }

    fn after(&self, step: Move) -> Vec<Option<usize>> {
        let of = |&to: &Option<usize>| if to == Some(step.gone) { step.to } else { to };
        self.map.iter().map(of).collect()
    }

    /// The move of the least loss; with a refit, of the least error after it among the best few of
    /// either kind.
    fn best(&self, mut tried: Vec<Tried>, cx: &Context) -> Result<Option<Tried>> {
        // Stable: of equals the smaller expert goes, and is dropped rather than redirected.
        tried.sort_by(|a, b| a.loss.total_cmp(&b.loss));
        if !self.method.refit {
            return Ok(tried.into_iter().next());
        }
        let few = self.method.shortlist.max(1);
        let (drops, redirects): (Vec<_>, Vec<_>) =
            tried.into_iter().partition(|t| t.step.to.is_none());
        let listed: Vec<Tried> =
            drops.into_iter().take(few).chain(redirects.into_iter().take(few)).collect();
        if listed.len() < 2 {
            return Ok(listed.into_iter().next());
        }
        let single = cx.per_task();
        let errors = par::map(listed.len(), |i| {
            let mut visits = self.visits.clone();
            put(&mut visits, &listed[i]);
            self.error(&visits, &self.after(listed[i].step), &single)
        })?;
        let least = (0..errors.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b]));
        Ok(least.and_then(|at| listed.into_iter().nth(at)))
    }

    fn take(&mut self, tried: Tried) {
        self.map = self.after(tried.step);
        let mut scratch = vec![0.0; self.probe.target.ncols()];
        for (&t, visits) in tried.tokens.iter().zip(&tried.visits) {
            self.missed[t] = self.probe.missed(t, visits, &mut scratch);
        }
        put(&mut self.visits, &tried);
    }

    /// Relative error: after a refit on the tokens that judge it, else on all.
    fn error(&self, visits: &[Visits], map: &[Option<usize>], cx: &Context) -> Result<f64> {
        if self.method.refit {
            let kept = (0..map.len()).filter(|&i| map[i] == Some(i)).count();
            return refit_error(self.probe, visits, kept, self.method.ridge, cx);
        }
        Ok(self.missed.iter().sum::<f64>() / self.probe.energy(0..self.probe.tokens()))
    }
}

fn put(visits: &mut [Visits], tried: &Tried) {
    for (&t, new) in tried.tokens.iter().zip(&tried.visits) {
        visits[t].clone_from(new);
    }
}

/// The grouping of a map from experts to the one that each has become.
pub(super) fn grouping(map: &[Option<usize>]) -> Result<Grouping> {
    let dominant: Vec<usize> = (0..map.len()).filter(|&i| map[i] == Some(i)).collect();
    let place = |e: usize| dominant.iter().position(|&d| d == e);
    let label = map.iter().map(|to| to.and_then(place)).collect();
    Ok(Grouping::new(label, dominant)?.renumbered(Numbering::ByDominant))
}

/// The experts that stay, alone: protected ones, and super experts where they are.
pub(super) fn alone(
    method: &Removal,
    probe: &Probe<'_>,
    (id, budget): (LayerId, &Budget),
) -> BTreeSet<usize> {
    let mut alone = budget.protected.get(&id).cloned().unwrap_or_default();
    if let Some(factor) = method.protect_super {
        alone.extend(outliers(&probe.peaks(), factor));
    }
    alone
}

/// The experts whose peak is more than `factor` times the median of the layer's.
fn outliers(peaks: &[f64], factor: f64) -> Vec<usize> {
    let mut sorted = peaks.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(&median) = sorted.get(sorted.len() / 2) else { return Vec::new() };
    (0..peaks.len()).filter(|&i| peaks[i] > factor * median).collect()
}
