//! Between the passes: one decision over all layers.

use std::collections::BTreeSet;

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Budget, Grouping, Numbering, RoutingStats, Target};
use crate::pipeline::layer::observe::ObservedLayer;
use crate::pipeline::layer::process::LayerShare;
use crate::pipeline::layer::stages::LayerStages;
use crate::pipeline::options::LayerShape;
use crate::stage::{Context, Grouper, LayerSummary};

/// Groups every layer. Where a narrowed router keeps its routing groups, each routing group is
/// handed to the grouper as a layer of its own, with its share of the budget: experts then merge
/// only inside it and every group keeps the same number, with no grouper having to know.
pub(crate) fn group_layers(
    grouper: &dyn Grouper,
    measured: &[ObservedLayer],
    shapes: &[LayerShape],
    budget: &Budget,
    narrow: bool,
    cx: &Context,
) -> Result<Vec<Grouping>> {
    let groups = |shape: &LayerShape| shape.rule.groups.map_or(1, |g| g.groups);
    let groupings = match budget.target {
        Target::PerLayer(m) if narrow && shapes.iter().any(|s| groups(s) > 1) => {
            let each = |(measured, shape): (&ObservedLayer, &LayerShape)| {
                in_routing_groups(grouper, &measured.summary, groups(shape), m, budget, cx)
                    .in_layer(shape.id)
            };
            measured.iter().zip(shapes).map(each).collect::<Result<Vec<_>>>()?
        }
        _ => {
            let summaries: Vec<LayerSummary> = measured.iter().map(|m| m.summary.clone()).collect();
            grouper.group(&summaries, budget, cx)?
        }
    };
    check(&groupings, shapes, budget, narrow, grouper.name())?;
    Ok(groupings.iter().map(|g| g.renumbered(Numbering::ByDominant)).collect())
}

/// Groups one layer, where no other has a say in how many experts it keeps.
pub(crate) fn group_layer(
    observed: &ObservedLayer,
    share: LayerShare<'_>,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<Grouping> {
    let LayerShare { shape, keep, budget } = share;
    let budget = Budget { target: Target::PerLayer(keep), ..budget.clone() };
    let (one, shapes) = (std::slice::from_ref(observed), std::slice::from_ref(&shape));
    let narrow = stages.router.is_some();
    let mut groupings = group_layers(stages.grouper, one, shapes, &budget, narrow, cx)?;
    groupings.pop().ok_or_else(|| Error::shape("groupings", 1, 0))
}

fn in_routing_groups(
    grouper: &dyn Grouper,
    layer: &LayerSummary,
    groups: usize,
    m: usize,
    budget: &Budget,
    cx: &Context,
) -> Result<Grouping> {
    let size = layer.experts() / groups;
    let (mut label, mut dominant) = (Vec::new(), Vec::new());
    for g in 0..groups {
        let experts: Vec<usize> = (g * size..(g + 1) * size).collect();
        let inside = |i: &usize| experts.contains(i).then(|| i - g * size);
        let protected: BTreeSet<usize> =
            budget.protected.get(&layer.id).into_iter().flatten().filter_map(inside).collect();
        let part = Budget {
            target: Target::PerLayer(m / groups),
            min_per_layer: 1,
            protected: [(layer.id, protected)].into(),
            ..budget.clone()
        };
        let summary = LayerSummary {
            id: layer.id,
            similarity: layer.similarity.select(&experts)?,
            stats: part_of(&layer.stats, &experts),
            candidates: None,
        };
        let grouping = grouper.group(&[summary], &part, cx)?;
        check(&grouping, &[size], &part, true, grouper.name())?;
        let offset = dominant.len();
        label.extend(grouping[0].labels().iter().map(|l| l.map(|l| l + offset)));
        dominant.extend(grouping[0].dominants().iter().map(|d| d + g * size));
    }
    Grouping::new(label, dominant)
}

/// The statistics of some experts, as if they were a layer.
fn part_of(stats: &RoutingStats, experts: &[usize]) -> RoutingStats {
    let pick = |v: &Option<Vec<f64>>| {
        v.as_ref().map(|v| experts.iter().map(|&i| v[i]).collect::<Vec<f64>>())
    };
    RoutingStats {
        tokens: stats.tokens,
        counts: experts.iter().map(|&i| stats.counts[i]).collect(),
        router_mass: pick(&stats.router_mass),
        output_norm: pick(&stats.output_norm),
        reap: pick(&stats.reap),
        ..RoutingStats::default()
    }
}

/// What the check needs to know of a layer.
trait Experts {
    fn experts(&self) -> usize;
}

impl Experts for usize {
    fn experts(&self) -> usize {
        *self
    }
}

impl Experts for LayerShape {
    fn experts(&self) -> usize {
        self.experts
    }
}

/// Holds every grouper, a user's own included, to its promise.
fn check(
    groupings: &[Grouping],
    layers: &[impl Experts],
    budget: &Budget,
    narrow: bool,
    grouper: &str,
) -> Result<()> {
    let fail = |reason: String| {
        let reason = format!("grouper `{grouper}` returned {reason}");
        Err(ErrorKind::Budget { reason }.into())
    };
    if groupings.len() != layers.len() {
        return fail(format!("{} groupings for {} layers", groupings.len(), layers.len()));
    }
    for (grouping, layer) in groupings.iter().zip(layers) {
        if grouping.experts() != layer.experts() {
            let (found, expected) = (grouping.experts(), layer.experts());
            return fail(format!("a grouping of {found} experts for a layer of {expected}"));
        }
        if grouping.groups() < budget.min_per_layer {
            let (found, least) = (grouping.groups(), budget.min_per_layer);
            return fail(format!("{found} groups where {least} are the least"));
        }
    }
    let total: usize = groupings.iter().map(Grouping::groups).sum();
    let expected = match budget.target {
        Target::PerLayer(m) => m * layers.len(),
        Target::Total(t) => t,
    };
    if total != expected {
        return fail(format!("{total} groups in all where {expected} were asked"));
    }
    if narrow && groupings.windows(2).any(|w| w[0].groups() != w[1].groups()) {
        let counts: Vec<usize> = groupings.iter().map(Grouping::groups).collect();
        return fail(format!(
            "{counts:?} groups per layer: a narrowed router needs the same number everywhere, \
             so spread the budget uniformly"
        ));
    }
    Ok(())
}
