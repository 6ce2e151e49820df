//! Align, merge, and narrow the router: the steps of a layer whose experts are all in memory.

use crate::align;
use crate::error::{Error, Locate, Result};
use crate::model::{
    Expert, ExpertTensors, ExpertView, Grouping, Permutation, Router, RoutingStats,
};
use crate::par;
use crate::pipeline::layer::process::LayerDecision;
use crate::pipeline::layer::stages::LayerStages;
use crate::stage::{Context, LayerView, Members, Merger};

/// One permutation of hidden units per expert of the layer, the identity where nothing has to be
/// aligned and for experts that stay alone. Inside groups an expert is aligned to the reference of
/// its group.
pub(crate) fn align_experts(
    view: &LayerView<'_>,
    decision: &LayerDecision,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<Vec<Permutation>> {
    let LayerDecision { observed, grouping } = decision;
    let experts = view.experts("align")?;
    let mut permutations = match (&observed.permutations, stages.alignment) {
        (Some(permutations), _) => permutations.clone(),
        (None, None) => experts.iter().map(|e| Permutation::identity(e.view().d_ff())).collect(),
        (None, Some(a)) => {
            let table = Some(&observed.summary.similarity);
            align::align_groups(&a.aligner, a.reference, view, grouping, table, cx)?
        }
    };
    for g in 0..grouping.groups() {
        if let [alone] = grouping.members(g)[..] {
            permutations[alone] = Permutation::identity(experts[alone].view().d_ff());
        }
    }
    Ok(permutations)
}

/// The merged expert of every group of several members, `None` for an expert that stays alone.
pub(crate) fn merge_groups(
    view: &LayerView<'_>,
    grouping: &Grouping,
    permutations: &[Permutation],
    merger: &dyn Merger,
    cx: &Context,
) -> Result<Vec<Option<Expert>>> {
    let all: Vec<ExpertView<'_>> = view.experts("merge")?.iter().map(Expert::view).collect();
    let inner = cx.per_task();
    par::map(grouping.groups(), |g| {
        let indices = grouping.members(g);
        if indices.len() == 1 {
            return Ok(None);
        }
        let experts: Vec<_> = indices.iter().map(|&i| all[i].reborrow()).collect();
        let permutations: Vec<_> = indices.iter().map(|&i| permutations[i].clone()).collect();
        let dominant = grouping.dominants()[g];
        let members = Members {
            layer: *view,
            indices: &indices,
            dominant: indices.iter().position(|&i| i == dominant).unwrap_or(0),
            experts: &experts,
            permutations: &permutations,
        };
        merge_members(merger, &members, &inner).in_expert(dominant).map(Some)
    })
}

/// One expert of the members of a group; holds every merger, a user's own included, to its promise.
pub(crate) fn merge_members(
    merger: &dyn Merger,
    members: &Members<'_>,
    cx: &Context,
) -> Result<Expert> {
    members.check()?;
    let merged = merger.merge(members, cx)?;
    let like = members.experts[0];
    if merged.view().same_kind(&like) {
        Ok(merged)
    } else {
        let found = merged.view().up.weight.dim();
        Err(Error::shape("merged expert of the members' kind", like.up.weight.dim(), found))
    }
}

/// The experts of all groups. Those that stay alone are moved, not copied, bit for bit and in their
/// own order of hidden units.
pub(crate) fn with_lone_experts(
    groups: Vec<Option<Expert>>,
    experts: Vec<Expert>,
    grouping: &Grouping,
) -> Result<Vec<Expert>> {
    let mut originals: Vec<Option<Expert>> = experts.into_iter().map(Some).collect();
    let fill = |(g, merged): (usize, Option<Expert>)| {
        let original = &mut originals[grouping.dominants()[g]];
        let expert = merged.or_else(|| original.take());
        expert.ok_or_else(|| Error::range("dominant expert", "one per group", "one of two groups"))
    };
    groups.into_iter().enumerate().map(fill).collect()
}

/// The router with one row per group; `None` where the recipe keeps the original's rows.
pub(crate) fn narrow_router(
    view: &LayerView<'_>,
    grouping: &Grouping,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<Option<Router>> {
    let Some(method) = stages.router else { return Ok(None) };
    let rule = stages.narrowed_rule(view.router.rule());
    let source = view.router.select(&(0..view.len()).collect::<Vec<_>>(), rule)?;
    if grouping.is_identity() {
        // Nothing was merged: no method may move a row by its rounding.
        return Ok(Some(source));
    }
    let narrowed = method.merge_router(&view.with_router(&source), grouping, cx)?;
    if narrowed.experts() != grouping.groups() {
        return Err(Error::shape("narrowed router", grouping.groups(), narrowed.experts()));
    }
    Ok(Some(narrowed))
}

/// `Σ_i P_i(∇W_i)` over the members of every group: the gradient of the loss by the weights of an
/// expert that stands for all of them, where the members are alike. `stage` is who asks.
pub(crate) fn merged_gradients(
    view: &LayerView<'_>,
    grouping: &Grouping,
    permutations: &[Permutation],
    stage: &str,
    cx: &Context,
) -> Result<ExpertTensors> {
    let all = RoutingStats::need(&view.stats.gradients, stage, "gradients")?;
    let inner = cx.per_task();
    par::map(grouping.groups(), |g| {
        let missing = || Error::shape("gradients of the experts", permutations.len(), all.len());
        let term = |&i: &usize| Some((1.0, all.get(i)?.view(), permutations.get(i)?));
        let terms: Option<Vec<_>> = grouping.members(g).iter().map(term).collect();
        Expert::weighted_sum(&terms.ok_or_else(missing)?, inner.compute())
            .in_expert(grouping.dominants()[g])
    })
}
