//! Removal of the experts whose absence changes the layer's output least, as measured.

mod exhaustive;
mod path;
mod probe;
mod refit;

use serde::{Deserialize, Serialize};

use self::path::Path;
use self::probe::Probe;
use super::quota::{Quota, Rest as Room, Spread, budget_error};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Budget, Grouping, SimilarityMatrix};
use crate::stage::{Candidate, Context, Grouper, LayerSummary, LayerView, Needs, Stage};

/// The treatment of an expert that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// The router can no longer choose it.
    Drop,
    /// Its tokens visit one of the experts most similar to it.
    Redirect,
    /// Expert by expert, whichever leaves the lesser error.
    #[default]
    Best,
}

/// Removes, one after the other, the expert whose removal leaves the least error
/// `Σ_x ‖y(x) − t(x)‖² / Σ_x ‖t(x)‖²`: `t` is the output of the layer's routed experts on sampled
/// tokens, `y` what remains, with the router's own rule (choice among those that stay,
/// renormalisation) and the weights of redirected experts added to their target's.
///
/// - `rest`: dropped, redirected to one of the `targets` most similar that stay, or by measurement
///   expert by expert (merge or prune). Use it with a merger that takes the dominant expert as it
///   is; others are then measured by their dominant expert.
/// - Dropping without a refit in a layer of at most `exhaustive` subsets tries all of them.
/// - `refit`: the error counted is that after all down projections have been refitted together
///   (ridge regression), on every fifth token, which the fit does not see. Of all moves the
///   `shortlist` best of either kind without refit are measured so.
/// - `spread = global`: layers compete. Each next expert goes to the layer whose measured error
///   falls most by it, on the lower convex hull of its error curve.
/// - `protect_super`: experts whose largest output entry, over their tokens, is more than this
///   multiple of the layer's median stay, alone.
///
/// Every number of experts down to 1 is measured once, while the layer is in memory; layers are
/// read once more for it. Cost for `t` tokens, `n` experts: a forward pass of every expert on every
/// token, `t k d` operations for each removal and target, `2^n t k d` if exhaustive, and
/// `2 n shortlist` times `t³/6 + 2 t² (k d_ff + d)` with a refit (`d` at most `width`). Memory
/// `4 n t d` bytes, `4 n t d_ff + 24 t²` more with a refit.
///
/// Source: Lu et al. (NAEE, arXiv 2402.14800) §3.2, which tries all subsets of 8 experts.
/// *Deviations:* the error is squared and relative, where the code adds up norms over batches and
/// so depends on their size; greedy beyond few experts; redirects, refit and spread are ours.
/// Outputs of more than `width` features are projected onto as many random signs, which keeps
/// squared errors to about `√(2/width)`. Super experts are those of arXiv 2507.23279, found there
/// by a percentile over all layers, here within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Removal {
    /// What becomes of the others.
    pub rest: Rest,
    /// Whether errors are those after a refit.
    pub refit: bool,
    /// Whether layers compete for the budget.
    pub spread: Spread,
    /// The most sampled tokens that are used, evenly spread over the samples.
    pub tokens: usize,
    /// How many of the most similar experts a redirect may choose from.
    pub targets: usize,
    /// How many moves of either kind are measured after a refit.
    pub shortlist: usize,
    /// The refit's ridge, relative to the mean eigenvalue.
    pub ridge: f64,
    /// The most subsets of a layer that are all tried.
    pub exhaustive: usize,
    /// The most features of an output that are looked at.
    pub width: usize,
    /// The multiple of the layer's median peak above which an expert stays; off unless given.
    pub protect_super: Option<f64>,
}

impl Default for Removal {
    fn default() -> Self {
        Self {
            rest: Rest::Best,
            refit: true,
            spread: Spread::Uniform,
            tokens: 1024,
            targets: 2,
            shortlist: 3,
            ridge: 0.1,
            exhaustive: 1024,
            width: 256,
            protect_super: None,
        }
    }
}

impl Stage for Removal {
    fn name(&self) -> &str {
        "removal"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Grouper for Removal {
    fn surveys(&self) -> bool {
        true
    }

    fn survey(
        &self,
        layer: &LayerView<'_>,
        similarity: &SimilarityMatrix,
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Candidate>> {
        if !self.ridge.is_finite() || self.ridge <= 0.0 {
            return Err(Error::range("ridge of a removal", "above 0", self.ridge));
        }
        if let Some(bad) = self.protect_super.filter(|f| !f.is_finite() || *f < 1.0) {
            return Err(Error::range("multiple of the median peak", "1 or more", bad));
        }
        let probe = Probe::new(self, layer, cx)?;
        let least = budget.min_per_layer.max(budget.protected_in(layer.id)).max(1);
        let given = (layer.id, budget);
        let all = self.rest == Rest::Drop && !self.refit;
        let found = if all { exhaustive::subsets(self, &probe, given, least)? } else { None };
        if let Some(found) = found {
            return Ok(found);
        }
        Path::new(self, &probe, similarity, given).candidates(least, cx)
    }

    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        _cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let room = if self.rest == Rest::Redirect { Room::Joins } else { Room::Drops };
        let quota = Quota::new(layers, budget, self.spread, room)?;
        let curves = layers.iter().map(|layer| {
            let found = layer.candidates.as_deref().ok_or_else(|| missing(self.name()));
            found.in_layer(layer.id)
        });
        let curves: Vec<&[Candidate]> = curves.collect::<Result<_>>()?;
        let gains: Vec<Vec<f64>> = layers.iter().zip(&curves).map(|(l, c)| gains(l, c)).collect();
        let order: Vec<Vec<usize>> = layers.iter().map(|l| (0..l.experts()).collect()).collect();
        let counts = quota.allot(&gains, &order);
        let pick = |((layer, curve), count): ((&LayerSummary, &&[Candidate]), usize)| {
            let found = curve.iter().find(|c| c.grouping.groups() == count);
            let low = curve.first().map_or(0, |c| c.grouping.groups());
            let reason = format!("{count} experts, but removals left at least {low}");
            found.map(|c| c.grouping.clone()).ok_or_else(|| budget_error(reason)).in_layer(layer.id)
        };
        layers.iter().zip(&curves).zip(counts).map(pick).collect()
    }
}

fn missing(stage: &str) -> Error {
    let needs = "removals measured on whole layers".into();
    let remedy = "group through a pipeline; with routing groups set routing_groups = \"flatten\"";
    ErrorKind::Missing { stage: stage.into(), needs, remedy: remedy.into() }.into()
}

/// By how much the error falls with the first, second, … expert: along the lower convex hull of the
/// curve, so that it falls less and less. What was not measured falls without bound: it must stay.
fn gains(layer: &LayerSummary, curve: &[Candidate]) -> Vec<f64> {
    let mut gains = vec![f64::INFINITY; layer.experts()];
    let points: Vec<(usize, f64)> = curve.iter().map(|c| (c.grouping.groups(), c.error)).collect();
    let mut hull: Vec<(usize, f64)> = Vec::new();
    let slope = |a: (usize, f64), b: (usize, f64)| (a.1 - b.1) / (b.0 - a.0) as f64;
    for &point in &points {
        while let [.., a, b] = hull[..] {
            // The middle point lies on or above the line of its neighbours.
            if slope(a, b) > slope(b, point) {
                break;
            }
            hull.pop();
        }
        hull.push(point);
    }
    for pair in hull.windows(2) {
        let gain = slope(pair[0], pair[1]);
        gains[pair[0].0..pair[1].0].iter_mut().for_each(|g| *g = gain);
    }
    gains
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LayerId, RoutingStats, Target};
    use ndarray::Array2;

    fn candidate(kept: usize, n: usize, error: f64) -> Candidate {
        let label = (0..n).map(|i| Some(i).filter(|&i| i < kept)).collect();
        Candidate { grouping: Grouping::new(label, (0..kept).collect()).unwrap(), error }
    }

    fn layer(index: usize, errors: &[f64]) -> LayerSummary {
        let n = errors.len();
        let curve = errors.iter().enumerate().map(|(i, &e)| candidate(i + 1, n, e));
        LayerSummary {
            id: LayerId::causal(index),
            similarity: SimilarityMatrix::from_similarities(Array2::eye(n)).unwrap(),
            stats: RoutingStats::from_counts(vec![1; n], n as u64),
            candidates: Some(curve.collect()),
        }
    }

    #[test]
    fn experts_go_where_the_error_falls_most() {
        let layers = [layer(0, &[0.9, 0.3, 0.1, 0.0]), layer(1, &[0.2, 0.1, 0.05, 0.0])];
        let counts = |total| {
            let budget = Budget::new(Target::Total(total));
            let method = Removal { spread: Spread::Global, ..Removal::default() };
            let found = method.group(&layers, &budget, &Context::cpu(0)).unwrap();
            found.iter().map(Grouping::groups).collect::<Vec<_>>()
        };
        assert_eq!(counts(3), [2, 1]); // 0.6 before 0.1
        assert_eq!(counts(4), [3, 1]); // 0.2 before 0.1
        assert_eq!(counts(5), [3, 2]); // a tie of 0.1: the smaller place
        assert_eq!(counts(8), [4, 4]);
        // A step that gains little hides one that gains much: the hull looks past it.
        let hidden = layer(0, &[0.9, 0.89, 0.1, 0.0]);
        let found = gains(&hidden, hidden.candidates.as_deref().unwrap());
        assert!((found[1] - 0.4).abs() < 1e-12 && found[1] == found[2], "{found:?}");
    }

    #[test]
    fn layers_that_were_not_measured_are_refused() {
        let mut bare = layer(0, &[0.5, 0.0]);
        bare.candidates = None;
        let budget = Budget::new(Target::PerLayer(1));
        let error = Removal::default().group(&[bare], &budget, &Context::cpu(0)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
        assert!(error.to_string().contains("flatten"), "{error}");
    }
}
