//! Ranking of experts by importance, and the assignment of the others to groups.

use serde::{Deserialize, Serialize};

use super::quota::{budget_error, free};
use crate::error::{ErrorKind, Locate, Result};
use crate::model::{Budget, Grouping, Importance, Numbering};
use crate::stage::{LayerSummary, Needs};

/// How scores of different layers are made comparable before layers compete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerScale {
    /// As they are (the authors' code); activation frequencies already sum to 1 over each layer.
    #[default]
    None,
    /// Each layer's largest score becomes 1 (the paper's text). Also sensible for output norms,
    /// which grow with depth.
    Max,
}

/// The statistics that a score is computed from.
pub fn needs_of(importance: Importance) -> Needs {
    match importance {
        Importance::Frequency => Needs::NONE,
        Importance::RouterMass => Needs::ROUTER_MASS,
        Importance::OutputNorm => Needs::OUTPUT_NORM,
        Importance::Reap => Needs::REAP,
    }
}

/// Scores of all layers, and the experts of each layer from best to worst.
pub(super) struct Ranking {
    /// `scores[l][i]`.
    pub(super) scores: Vec<Vec<f64>>,
    /// Protected experts first, then larger score, then smaller index.
    pub(super) order: Vec<Vec<usize>>,
}

impl Ranking {
    /// Ranks by importance.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] when the statistics lack the score, [`ErrorKind::Statistics`] when
    /// they count other experts.
    pub(super) fn new(
        layers: &[LayerSummary],
        budget: &Budget,
        importance: Importance,
        scale: LayerScale,
    ) -> Result<Self> {
        let score = |layer: &LayerSummary| {
            let scores = importance.of(&layer.stats)?;
            if scores.len() != layer.experts() {
                let reason = format!("{} scores for {} experts", scores.len(), layer.experts());
                return Err(ErrorKind::Statistics { reason }.into()).in_layer(layer.id);
            }
            Ok(scaled(scores, scale))
        };
        let scores: Vec<Vec<f64>> = layers.iter().map(score).collect::<Result<_>>()?;
        let order = layers.iter().zip(&scores).map(|(l, s)| ranked(l, budget, s)).collect();
        Ok(Self { scores, order })
    }
}

fn scaled(mut scores: Vec<f64>, scale: LayerScale) -> Vec<f64> {
    let largest = scores.iter().copied().fold(0.0, f64::max);
    let by = if scale == LayerScale::Max && largest > 0.0 { largest } else { 1.0 };
    // The addition turns −0 into 0, which a total order would tell apart.
    scores.iter_mut().for_each(|s| *s = *s / by + 0.0);
    scores
}

fn ranked(layer: &LayerSummary, budget: &Budget, scores: &[f64]) -> Vec<usize> {
    let shared = |i: usize| !budget.is_protected(layer.id, i);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // The sort is stable: the smaller index stays in front.
    order.sort_by(|&a, &b| shared(a).cmp(&shared(b)).then(scores[b].total_cmp(&scores[a])));
    order
}

/// Keeps the first `kept` experts of `order`; the others, in that order, join the most similar of
/// them whose group has room. Of equally similar ones the better ranked wins.
///
/// # Errors
/// [`ErrorKind::Budget`](crate::ErrorKind::Budget) when no group has room.
pub(super) fn join_most_similar(
    layer: &LayerSummary,
    budget: &Budget,
    order: &[usize],
    kept: usize,
) -> Result<Grouping> {
    let (dominant, others) = order.split_at(kept.min(order.len()));
    let capacity = budget.group_capacity.unwrap_or(usize::MAX);
    let similarity = layer.similarity.similarities();
    let mut label = vec![None; order.len()];
    dominant.iter().enumerate().for_each(|(g, &d)| label[d] = Some(g));
    let mut size = vec![1; dominant.len()];
    for &i in others {
        let mut best: Option<usize> = None;
        for (g, &d) in dominant.iter().enumerate() {
            let open = size[g] < capacity && !budget.is_protected(layer.id, d);
            let better = |b: usize| similarity[[i, d]] > similarity[[i, dominant[b]]];
            if open && best.is_none_or(better) {
                best = Some(g);
            }
        }
        let Some(g) = best else { return Err(no_room(layer, budget, kept, i)) };
        label[i] = Some(g);
        size[g] += 1;
    }
    Ok(Grouping::new(label, dominant.to_vec())?.renumbered(Numbering::ByDominant))
}

fn no_room(layer: &LayerSummary, budget: &Budget, kept: usize, i: usize) -> crate::Error {
    let open = kept.saturating_sub(budget.protected_in(layer.id));
    budget_error(format!(
        "no group has room for expert {i}: {} experts for {open} groups of at most {}",
        free(layer, budget).len(),
        budget.group_capacity.unwrap_or(usize::MAX),
    ))
}
