//! Narrowed routers, with one row per group, for runtimes without an expert map.
//!
//! | method | row of a group | needs |
//! |---|---|---|
//! | [`DominantRow`] | the dominant expert's | – |
//! | [`MeanRow`] | usage-weighted mean of the members' | counts |
//! | [`LogSumExpFit`] | least-squares fit of the group's probability mass | samples |
//!
//! The exact alternative, the `n`-row router with an expert map, is no merge: it is the export's
//! choice. Every router here keeps the policy (scores, top-k, renormalisation, scale, routing
//! groups), so top-k must not exceed the number of groups. Dropped experts leave no trace.

mod correction;
mod dominant_row;
mod log_sum_exp_fit;
mod mean_row;

pub use dominant_row::DominantRow;
pub use log_sum_exp_fit::{LogSumExpFit, Prior, SigmoidMass};
pub use mean_row::MeanRow;

use crate::error::{Error, Result};
use crate::model::{Grouping, RoutingRule};
use crate::stage::LayerView;

/// The layer's policy, checked against the number of groups.
fn narrowed_rule(layer: &LayerView<'_>, grouping: &Grouping) -> Result<RoutingRule> {
    if grouping.experts() != layer.len() {
        return Err(Error::shape("grouping of a layer", layer.len(), grouping.experts()));
    }
    let (rule, m) = (*layer.router.rule(), grouping.groups());
    if rule.top_k > m {
        let what = "top-k of a router narrowed to the groups";
        return Err(Error::range(what, format!("at most {m} (groups)"), rule.top_k));
    }
    match rule.groups.and_then(|groups| groups.misfit(m, rule.top_k)) {
        None => Ok(rule),
        Some(misfit) => {
            let what = "routing groups of a router narrowed to the groups";
            Err(Error::range(what, "an even split", misfit))
        }
    }
}
