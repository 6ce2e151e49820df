//! The order of the method on one layer, in one place. Every run, in memory and on disk, in one
//! pass and in two, on all layers and on a part of them, calls [`process_layer`].
//!
//! ```text
//! observe → similarity → group → router → align → merge → recover → compress → measure
//! ```
//!
//! Where layers share a budget, [`observe_source`] and the grouper see all of them first, and
//! [`process_layer`] gets the decision; else it makes the decision itself.
//!
//! [`observe_source`]: super::observe::observe_source

use ndarray::s;

use crate::checkpoint::Factoring;
use crate::error::{Error, Result};
use crate::model::{Budget, Grouping, LayerId, MergedLayer, MoeLayer, Router, RoutingStats};
use crate::pipeline::activations::samples::LayerSamples;
use crate::pipeline::layer::by_group::ExpertsByGroup;
use crate::pipeline::layer::compress;
use crate::pipeline::layer::grouping::group_layer;
use crate::pipeline::layer::measure::{Original, describe, fit_rows, output_error};
use crate::pipeline::layer::merge::{
    align_experts, merge_groups, merged_gradients, narrow_router, with_lone_experts,
};
use crate::pipeline::layer::observe::{ObservedLayer, observe_layer};
use crate::pipeline::layer::spectra;
use crate::pipeline::layer::stages::LayerStages;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{LayerProgress, Phase};
use crate::pipeline::report::LayerReport;
use crate::stage::{Compression, Context, LayerView, Needs, Recovery};

/// A layer that is to be processed.
pub(crate) struct LayerInput<'a> {
    pub(crate) experts: Experts<'a>,
    /// At least what the stages [need](LayerStages::merge_needs).
    pub(crate) stats: RoutingStats,
    /// Inputs and outputs of the layer on a text; else they are those in `stats`, if any.
    pub(crate) samples: Option<&'a LayerSamples>,
    pub(crate) progress: LayerProgress<'a>,
}

/// Where the experts of a layer are.
pub(crate) enum Experts<'a> {
    /// All in memory.
    InMemory(MoeLayer),
    /// On disk: read, merged and handed on group by group. Only for stages that
    /// [work by group](LayerStages::works_by_group).
    ByGroup(Router, ExpertsByGroup<'a>),
}

/// Which experts become one.
#[derive(Clone, Copy)]
pub(crate) enum Decision<'a> {
    /// Known, from a decision over all layers at once.
    Made(&'a LayerDecision),
    /// Still to be made, for this layer alone.
    Alone(LayerShare<'a>),
}

/// What was observed of a layer, and how its experts are grouped.
pub(crate) struct LayerDecision {
    pub(crate) observed: ObservedLayer,
    pub(crate) grouping: Grouping,
}

/// How many experts a layer keeps, where no other layer has a say in it.
#[derive(Clone, Copy)]
pub(crate) struct LayerShare<'a> {
    pub(crate) shape: LayerShape,
    pub(crate) keep: usize,
    pub(crate) budget: &'a Budget,
}

/// What became of a layer.
pub(crate) struct ProcessedLayer {
    /// `None` where every expert was handed on as soon as it was merged.
    pub(crate) merged: Option<MergedLayer>,
    pub(crate) report: LayerReport,
}

/// Takes a layer through all stages, in the order of the method.
///
/// # Errors
/// Those of the stages, with the expert where one is known.
///
/// # Memory
/// The layer and its merged experts; experts that stay alone are moved, not copied. With samples
/// their inputs twice and the original's outputs on them once. By group: a group per thread.
pub(crate) fn process_layer(
    input: LayerInput<'_>,
    decision: Decision<'_>,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<ProcessedLayer> {
    let LayerInput { experts, stats, samples, progress } = input;
    let id = progress.layer;
    stats.validate(experts.router().experts(), experts.router().weight().ncols())?;

    // 1 to 3. Observe the layer, compute similarities, group the experts: here, or earlier over all
    // layers at once.
    let made_here;
    let decision = match decision {
        Decision::Made(made) => made,
        Decision::Alone(share) => {
            progress.started(Phase::Measure);
            let observed = observe_layer(experts.in_memory()?, &stats, stages, cx)?;
            let grouping = group_layer(&observed, share, stages, cx)?;
            made_here = LayerDecision { observed, grouping };
            &made_here
        }
    };
    let LayerDecision { observed, grouping } = decision;
    progress.started(Phase::Merge);

    // 4. Narrow the router, which depends on the groups, not on what becomes of their experts.
    let narrowed = narrow_router(&experts.view(id, &stats), grouping, stages, cx)?;

    // Group by group, aligning and merging are all that is left to do.
    let layer = match experts {
        Experts::InMemory(layer) => layer,
        Experts::ByGroup(router, by_group) => {
            let view = LayerView::new(id, &router, &stats);
            by_group.sink.begin(id, grouping, &router, narrowed.as_ref())?;
            let kind = by_group.merge(&view, decision, stages, cx)?;
            let original = Original::of_kind(kind, &router);
            let report = describe(original, decision, narrowed.as_ref().unwrap_or(&router));
            return Ok(ProcessedLayer { merged: None, report });
        }
    };
    let view = LayerView::of(&layer, &stats);
    let original = Original::measure(&layer, grouping, stages, cx)?;
    let rows = fit_rows(samples, &layer, &stats, stages, cx)?;

    // 5. Align the hidden units of the experts.
    let permutations = align_experts(&view, decision, stages, cx)?;

    // 6. Merge the members of every group.
    let groups = merge_groups(&view, grouping, &permutations, stages.merger, cx)?;
    let gradients = match stages.compressor.filter(|c| c.needs().contains(Needs::GRADIENTS)) {
        None => None,
        Some(c) => Some(merged_gradients(&view, grouping, &permutations, c.name(), cx)?),
    };
    let (experts, router) = layer.into_parts();
    let experts = with_lone_experts(groups, experts, grouping)?;
    let mut merged = MergedLayer::new(id, experts, grouping.clone(), router, narrowed)?;

    // 7. Recover: fit the merged layer to the original's outputs.
    let task: Option<Recovery<'_>> = rows.as_ref().map(|rows| rows.task(stages.router.is_some()));
    if let (Some(recoverer), Some(task)) = (stages.recoverer, &task) {
        merged = recoverer.recover(task, merged, cx)?;
    }
    let chosen_by = merged.narrowed.as_ref().unwrap_or(&merged.router);
    let original_ranks = original.ranks.clone();
    let mut report = describe(original, decision, chosen_by);
    spectra::merged(&mut report.spectra, &merged.experts, cx)?;

    // 8. Compress the merged experts.
    if let (Some(compressor), Some(ranks)) = (stages.compressor, &original_ranks) {
        let fitted = task.as_ref().filter(|_| samples.is_some());
        let fitted = fitted.map(|task| task.inputs.slice_move(s![..task.fitted(), ..]));
        let compression = Compression {
            inputs: fitted.or_else(|| stats.samples.as_ref().map(|s| s.inputs.view())),
            narrowed: stages.router.is_some(),
            usage: &observed.usage(grouping),
            gradients: gradients.as_ref(),
            allocated: stages.ranks.and_then(|ranks| ranks.get(&id)).map(Factoring::experts),
        };
        let (layer, found) = compress::compress(compressor, merged, ranks, &compression, cx)?;
        (merged, report.compression) = (layer, Some(found));
        spectra::compressed(&mut report.spectra, &merged.experts, cx)?;
    }

    // 9. Measure the error of the layer's output on tokens that no recoverer was fitted to.
    report.output_error = task.map(|task| output_error(&task, &merged, cx)).transpose()?;
    Ok(ProcessedLayer { merged: Some(merged), report })
}

impl Experts<'_> {
    fn router(&self) -> &Router {
        match self {
            Self::InMemory(layer) => layer.router(),
            Self::ByGroup(router, _) => router,
        }
    }

    fn view<'v>(&'v self, id: LayerId, stats: &'v RoutingStats) -> LayerView<'v> {
        match self {
            Self::InMemory(layer) => LayerView::of(layer, stats),
            Self::ByGroup(router, _) => LayerView::new(id, router, stats),
        }
    }

    fn in_memory(&self) -> Result<&MoeLayer> {
        match self {
            Self::InMemory(layer) => Ok(layer),
            Self::ByGroup(..) => Err(lost("experts to observe", "in memory")),
        }
    }
}

impl ProcessedLayer {
    /// The merged layer, of a run that holds whole layers.
    pub(crate) fn in_memory(self) -> Result<(MergedLayer, LayerReport)> {
        let merged = self.merged.ok_or_else(|| lost("merged layer", "in memory"))?;
        Ok((merged, self.report))
    }
}

fn lost(what: &str, expected: &str) -> Error {
    Error::range(what, expected, "handed on group by group")
}

impl LayerDecision {
    /// Which layer it is of.
    pub(crate) fn id(&self) -> LayerId {
        self.observed.summary.id
    }
}
