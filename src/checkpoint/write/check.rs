//! What a plan must satisfy before any work: that the runtimes meant to load the target can.

use super::companion_files::companion_files;
use super::request::{Export, WritePlan};
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::families;
use crate::model::{Grouping, LayerId, RoutingRule};

/// The rule of a layer's router in the target.
pub(super) fn target_rule(rule: RoutingRule, plan: &WritePlan) -> RoutingRule {
    let groups = if plan.flatten_groups { None } else { rule.groups };
    RoutingRule { top_k: plan.top_k.unwrap_or(rule.top_k), groups, ..rule }
}

/// Whether a family's code fixes the number of experts per token.
fn fixes_top_k(family: &str) -> bool {
    families::find(family).is_some_and(|family| family.routing.fixed_top_k.is_some())
}

/// Refuses what could not be loaded; the stock export's number of experts.
pub(super) fn check(source: &Checkpoint, plan: &WritePlan) -> Result<Option<usize>> {
    let unsupported = |what, found: &str, supported: &str| -> Error {
        ErrorKind::Unsupported { what, found: found.into(), supported: supported.into() }.into()
    };
    if source.is_native() {
        let supported = "the original checkpoint";
        return Err(unsupported("source of a merge", "a native folder", supported));
    }
    crate::checkpoint::quant::schemes::check_method(source.config())
        .in_file(&source.dir().join("config.json"))?;
    if plan.only.is_none() {
        companion_files(source.dir())?;
    }
    if plan.export == Export::Expanded && (plan.top_k.is_some() || plan.flatten_groups) {
        let reason = "the expanded export leaves the router and its config as they are".into();
        return Err(ErrorKind::Recipe { reason }.into());
    }
    if plan.export != Export::Stock && plan.flatten_groups {
        let reason = "only the stock export flattens routing groups".into();
        return Err(ErrorKind::Recipe { reason }.into());
    }
    for (id, grouping) in &plan.groupings {
        let experts = source.layer(*id)?.experts;
        if grouping.experts() != experts {
            return Err(Error::shape("grouping", experts, grouping.experts())).in_layer(id);
        }
        let planned = plan.factored.get(id).map_or(grouping.groups(), |f| f.experts().len());
        if planned != grouping.groups() {
            return Err(Error::shape("factors of experts", grouping.groups(), planned))
                .in_layer(id);
        }
        check_dropped(plan.export, grouping).in_layer(id)?;
    }
    for layer in source.layers() {
        let k = plan.top_k.unwrap_or(layer.rule.top_k);
        if k == 0 || k > layer.rule.top_k {
            let expected = format!("1..={}", layer.rule.top_k);
            return Err(Error::range("experts per token (top-k)", expected, k)).in_layer(layer.id);
        }
        if k < layer.rule.top_k && fixes_top_k(source.family()) {
            let (found, supported) = (format!("top-{k}"), format!("top-{}", layer.rule.top_k));
            return Err(unsupported("routing of this family", &found, &supported));
        }
    }
    if let Some(d_ff) = plan.d_ff {
        reduced(source, plan, d_ff)?;
    }
    if plan.export == Export::Stock { uniform(source, plan).map(Some) } else { Ok(None) }
}

/// Refuses dropped experts where the router would still choose them.
pub(super) fn check_dropped(export: Export, grouping: &Grouping) -> Result<()> {
    if export != Export::Expanded || !grouping.labels().contains(&None) {
        return Ok(());
    }
    let found = "dropped experts, whose router rows would still choose them".into();
    let what = "expanded export";
    Err(ErrorKind::Unsupported { what, found, supported: "merged experts".into() }.into())
}

/// Refuses experts of another width where a runtime could not know it.
fn reduced(source: &Checkpoint, plan: &WritePlan, d_ff: usize) -> Result<()> {
    let refuse = |reason: &str| Err(ErrorKind::Recipe { reason: reason.into() }.into());
    if !source.can_hold_factors() {
        let kind = ErrorKind::Unsupported {
            what: "layout for experts of a smaller size",
            found: source.layout().into(),
            supported: "layouts with a tensor for every projection".into(),
        };
        return Err(kind.into());
    }
    for layer in source.layers() {
        if d_ff == 0 || d_ff > layer.d_ff {
            let expected = format!("1 to {}", layer.d_ff);
            return Err(Error::range("hidden units of experts", expected, d_ff)).in_layer(layer.id);
        }
        if !plan.groupings.contains_key(&layer.id) {
            return refuse("experts of a smaller size need every MoE layer: protect none");
        }
    }
    super::target_config::width_key(source).map(drop)
}

/// The number of experts of a stock export, the same in every layer and enough to route.
fn uniform(source: &Checkpoint, plan: &WritePlan) -> Result<usize> {
    let mut first: Option<(LayerId, usize)> = None;
    for layer in source.layers() {
        let m = plan.groupings.get(&layer.id).map_or(layer.experts, Grouping::groups);
        let (other, expected) = *first.get_or_insert((layer.id, m));
        if m != expected {
            let reason = format!(
                "the stock export needs one number of experts in every layer, but {other} keeps \
                 {expected} and {} keeps {m}",
                layer.id
            );
            return Err(ErrorKind::Budget { reason }.into());
        }
        let rule = target_rule(layer.rule, plan);
        if rule.top_k > m {
            return Err(Error::range("experts per token (top-k)", format!("1..={m}"), rule.top_k))
                .in_layer(layer.id);
        }
        if let Some(misfit) = rule.groups.and_then(|g| g.misfit(m, rule.top_k)) {
            return Err(Error::range("routing groups", "an even split", misfit)).in_layer(layer.id);
        }
    }
    Ok(first.map_or(0, |(_, m)| m))
}
