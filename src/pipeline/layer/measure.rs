//! What the report tells of a layer: as it was, and as it became.

use crate::error::Result;
use crate::model::{Grouping, MergedLayer, MoeLayer, Router, RoutingRule, RoutingStats};
use crate::pipeline::activations::samples::{FitRows, LayerSamples, split};
use crate::pipeline::layer::compress;
use crate::pipeline::layer::observe::ObservedLayer;
use crate::pipeline::layer::process::LayerDecision;
use crate::pipeline::layer::spectra;
use crate::pipeline::layer::stages::LayerStages;
use crate::pipeline::report::{self, Change, Kind, LayerReport, OutputError, SpectrumReport};
use crate::stage::{Context, Recovery};

/// A layer as it was, in the figures that later ones are compared with.
pub(crate) struct Original {
    pub(crate) experts: usize,
    pub(crate) kind: Kind,
    pub(crate) rule: RoutingRule,
    /// Stable ranks, where there is a compressor.
    pub(crate) ranks: Option<Vec<f64>>,
    pub(crate) spectra: Vec<SpectrumReport>,
}

impl Original {
    /// Of a layer in memory.
    pub(crate) fn measure(
        layer: &MoeLayer,
        grouping: &Grouping,
        stages: &LayerStages<'_>,
        cx: &Context,
    ) -> Result<Self> {
        let ranks = |_| compress::original_ranks(layer, grouping, cx);
        Ok(Self {
            experts: layer.experts().len(),
            kind: Kind::of(&layer.experts()[0]),
            rule: *layer.router().rule(),
            ranks: stages.compressor.map(ranks).transpose()?,
            spectra: spectra::original(layer.experts(), stages.measure_spectra, cx)?,
        })
    }

    /// Of a layer whose experts are never in memory at once.
    pub(crate) fn of_kind(kind: Kind, router: &Router) -> Self {
        let (experts, rule) = (router.experts(), *router.rule());
        Self { experts, kind, rule, ranks: None, spectra: Vec::new() }
    }
}

/// Rows on which the layer is recovered and measured: `samples` of a text, or those in the
/// statistics, for which the original layer is run; `None` where there are none, or nobody asks.
pub(crate) fn fit_rows<'a>(
    samples: Option<&LayerSamples>,
    layer: &MoeLayer,
    stats: &'a RoutingStats,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<Option<FitRows<'a>>> {
    if let Some(samples) = samples {
        return samples.split().map(Some);
    }
    let Some(found) = stats.samples.as_ref().filter(|_| stages.compares_outputs()) else {
        return Ok(None);
    };
    let inputs = found.inputs.view();
    let targets = layer.routed_output(inputs, cx.compute())?;
    Ok(Some(match stages.recoverer {
        Some(_) => split(&[inputs], &[targets.view()], &[])?,
        None => FitRows::unfitted(inputs, targets),
    }))
}

/// Output errors of a merged layer on the rows of `task` that no recoverer was fitted to.
pub(crate) fn output_error(
    task: &Recovery<'_>,
    merged: &MergedLayer,
    cx: &Context,
) -> Result<OutputError> {
    let error = |narrowed| Recovery { narrowed, ..*task }.error(merged, cx);
    Ok(OutputError {
        mapped: error(false)?,
        narrowed: merged.narrowed.as_ref().map(|_| error(true)).transpose()?,
    })
}

/// The report of one layer; `router` is the one that chooses afterwards.
pub(crate) fn describe(
    original: Original,
    decision: &LayerDecision,
    router: &Router,
) -> LayerReport {
    let LayerDecision { observed: ObservedLayer { summary, .. }, grouping } = decision;
    let Original { experts, kind, rule, spectra, .. } = original;
    let usage = summary.stats.usage();
    let (groups, dropped) = report::groups_of(grouping, &usage);
    let (n, m) = (experts as u64, grouping.groups() as u64);
    LayerReport {
        layer: summary.id,
        experts: Change { before: n, after: m },
        expert_parameters: Change { before: n * kind.parameters, after: m * kind.parameters },
        flops_per_token: Change {
            before: report::flops_per_token(kind, &rule, experts),
            after: report::flops_per_token(kind, router.rule(), router.experts()),
        },
        usage,
        tokens: summary.stats.counts.clone(),
        similarity: report::rounded(summary.similarity.similarities()),
        groups,
        dropped,
        output_error: None,
        compression: None,
        spectra,
    }
}
