//! The order of the stages, and nothing else: measure every layer, decide once over all layers,
//! then merge layer by layer. Works on anything that yields layers, so that checkpoints and
//! in-memory layers share one path.

use ndarray::Array2;

use crate::align;
use crate::checkpoint::Factoring;
use crate::error::{Error, Locate, Result};
use crate::model::{
    Expert, ExpertTensors, ExpertView, Grouping, LayerId, MergedLayer, MoeLayer, Permutation,
    Router, RoutingRule, RoutingStats, SimilarityMatrix,
};
use crate::par;
use crate::pipeline::activations::samples::Seen;
use crate::pipeline::compress;
use crate::pipeline::layer::spectra;
use crate::pipeline::options::{AlignWhen, Alignment, Plan};
use crate::pipeline::progress::{Observer, Phase};
use crate::pipeline::report::{self, Change, Kind, LayerReport, OutputError};
use crate::stage::{
    Compression, Context, LayerSummary, LayerView, Members, Merger, Needs, Recovery, RouterMerger,
    Similarity, relative_error,
};

/// Where layers and their statistics come from.
pub(crate) trait Source {
    /// The layer's router, without its experts.
    fn router(&self, id: LayerId) -> Result<Router>;
    /// The whole layer.
    fn layer(&self, id: LayerId) -> Result<MoeLayer>;
    /// One expert.
    fn expert(&self, id: LayerId, i: usize) -> Result<Expert>;
    /// The statistics that `needs` asks for.
    fn stats(&self, id: LayerId, needs: Needs) -> Result<RoutingStats>;
    /// The layer is not needed for now.
    fn release(&self, _id: LayerId) {}
}

/// What the first pass keeps of a layer.
pub(crate) struct Measured {
    pub(crate) summary: LayerSummary,
    /// Layer-wide alignment, when the plan asks for it.
    pub(crate) permutations: Option<Vec<Permutation>>,
}

/// First pass over one layer: similarity and, if asked for, layer-wide alignment before it.
pub(crate) fn measure(
    source: &dyn Source,
    id: LayerId,
    similarity: &dyn Similarity,
    alignment: Option<&Alignment>,
    needs: Needs,
    cx: &Context,
) -> Result<Measured> {
    let mut needs = needs | similarity.needs();
    if let Some(before) = before_grouping(alignment) {
        needs = needs | before.aligner.needs() | Needs::EXPERTS;
    }
    let stats = source.stats(id, needs)?;
    let measured = if needs.contains(Needs::EXPERTS) {
        let layer = source.layer(id)?;
        measure_layer(&layer, &stats, similarity, alignment, cx)?
    } else {
        let router = source.router(id)?;
        stats.validate(router.experts(), router.weight().ncols())?;
        let table = similarity.similarity(&LayerView::new(id, &router, &stats), cx)?;
        Measured::new(id, table, &stats, None)?
    };
    source.release(id);
    Ok(measured)
}

/// [`measure`] of a layer that is in memory.
pub(crate) fn measure_layer(
    layer: &MoeLayer,
    stats: &RoutingStats,
    similarity: &dyn Similarity,
    alignment: Option<&Alignment>,
    cx: &Context,
) -> Result<Measured> {
    stats.validate(layer.experts().len(), layer.router().weight().ncols())?;
    let Some(a) = before_grouping(alignment) else {
        let table = similarity.similarity(&LayerView::of(layer, stats), cx)?;
        return Measured::new(layer.id(), table, stats, None);
    };
    let view = LayerView::of(layer, stats);
    let permutations = align::align_layer(&a.aligner, a.reference, &view, cx)?;
    // Metrics on weights see the aligned experts: that is what aligning first is for.
    let aligned = permuted(layer, &permutations, cx)?;
    let table = similarity.similarity(&LayerView::of(&aligned, stats), cx)?;
    Measured::new(layer.id(), table, stats, Some(permutations))
}

fn before_grouping(alignment: Option<&Alignment>) -> Option<&Alignment> {
    alignment.filter(|a| a.when == AlignWhen::BeforeGrouping)
}

impl Measured {
    /// Keeps of the statistics what is small.
    fn new(
        id: LayerId,
        similarity: SimilarityMatrix,
        stats: &RoutingStats,
        permutations: Option<Vec<Permutation>>,
    ) -> Result<Self> {
        if similarity.experts() != stats.experts() {
            let found = similarity.experts();
            return Err(Error::shape("similarity matrix", stats.experts(), found));
        }
        let stats = RoutingStats {
            tokens: stats.tokens,
            counts: stats.counts.clone(),
            logit_gram: stats.logit_gram.clone(),
            router_mass: stats.router_mass.clone(),
            output_norm: stats.output_norm.clone(),
            reap: stats.reap.clone(),
            mean_output: stats.mean_output.clone(),
            samples: None,
            gradients: None,
            fisher: None,
        };
        Ok(Self { summary: LayerSummary { id, similarity, stats, candidates: None }, permutations })
    }

    /// For each group the share of the layer's (token, slot) pairs that went to its members.
    pub(crate) fn usage(&self, grouping: &Grouping) -> Vec<f64> {
        let usage = self.summary.stats.usage();
        let of = |g: usize| grouping.members(g).iter().map(|&e| usage[e]).sum();
        (0..grouping.groups()).map(of).collect()
    }
}

fn permuted(layer: &MoeLayer, permutations: &[Permutation], cx: &Context) -> Result<MoeLayer> {
    let inner = cx.per_task();
    let experts = par::map(permutations.len(), |i| {
        layer.experts()[i].view().permuted(&permutations[i], inner.compute()).in_expert(i)
    })?;
    MoeLayer::new(layer.id(), experts, layer.router().clone())
}

/// Second pass over one layer: align, merge, narrow the router, measure the error.
///
/// Experts that stay alone are moved, not copied, so that at most the layer and the merged experts
/// of the other groups are in memory.
pub(crate) fn merge(
    source: &dyn Source,
    measured: &Measured,
    grouping: &Grouping,
    plan: &Plan<'_>,
    cx: &Context,
) -> Result<(MergedLayer, LayerReport)> {
    let id = measured.summary.id;
    let layer = source.layer(id)?;
    let stats = source.stats(id, plan.merge_needs())?;
    let merged = merge_layer(layer, &stats, measured, grouping, plan, cx)?;
    source.release(id);
    Ok(merged)
}

/// [`merge`] of a layer that is in memory. With a recoverer and samples, it is recovered on their
/// inputs, and its error is that on the samples which no fit saw. A compressor comes last.
pub(crate) fn merge_layer(
    layer: MoeLayer,
    stats: &RoutingStats,
    measured: &Measured,
    grouping: &Grouping,
    plan: &Plan<'_>,
    cx: &Context,
) -> Result<(MergedLayer, LayerReport)> {
    let id = measured.summary.id;
    stats.validate(layer.experts().len(), layer.router().weight().ncols())?;
    let before = Before::of(&layer, stats, plan, cx)?;
    let ranks =
        plan.compressor.map(|_| compress::original_ranks(&layer, grouping, cx)).transpose()?;
    let mut spectra = spectra::original(layer.experts(), plan.measure_spectra, cx)?;
    let view = LayerView::of(&layer, stats);
    let (groups, permutations) = merge_groups(&view, measured, grouping, plan, cx)?;
    let gradients = match plan.compressor {
        Some(c) if c.needs().contains(Needs::GRADIENTS) => {
            Some(gradients(&view, grouping, &permutations, cx)?)
        }
        _ => None,
    };
    let narrowed = match plan.router {
        None => None,
        Some(router) => Some(narrow(router, &view, grouping, plan, cx)?),
    };
    let (experts, router) = layer.into_parts();
    let experts = put_alone(groups, experts, grouping)?;
    let mut merged = MergedLayer::new(id, experts, grouping.clone(), router, narrowed)?;
    if let (Some(recoverer), Some((inputs, targets))) = (plan.recoverer, &before.outputs) {
        let (inputs, targets, held_out) = Seen::samples(inputs.clone(), targets.clone()).split()?;
        let (inputs, targets) = (inputs.view(), targets.view());
        let task = Recovery { inputs, targets, narrowed: plan.router.is_some(), held_out };
        merged = recoverer.recover(&task, merged, cx)?;
    }
    spectra::merged(&mut spectra, &merged.experts, cx)?;
    let mut compression = None;
    if let (Some(compressor), Some(ranks)) = (plan.compressor, ranks) {
        let inputs = stats.samples.as_ref().map(|s| s.inputs.view());
        let task = Compression {
            inputs,
            narrowed: plan.router.is_some(),
            usage: &measured.usage(grouping),
            gradients: gradients.as_ref(),
            allocated: plan.ranks.and_then(|ranks| ranks.get(&id)).map(Factoring::experts),
        };
        let (layer, found) = compress::compress(compressor, merged, &ranks, &task, cx)?;
        (merged, compression) = (layer, Some(found));
        spectra::compressed(&mut spectra, &merged.experts, cx)?;
    }
    let error = before.error_of(&merged, cx)?;
    let router = merged.narrowed.as_ref().unwrap_or(&merged.router);
    let report = describe(&before, grouping, router, &measured.summary, error);
    Ok((merged, LayerReport { compression, spectra, ..report }))
}

/// `Σ_i P_i(∇W_i)` over the members of every group: the gradient of the loss by the weights of an
/// expert that stands for all of them, where the members are alike.
fn gradients(
    view: &LayerView<'_>,
    grouping: &Grouping,
    permutations: &[Permutation],
    cx: &Context,
) -> Result<ExpertTensors> {
    let all = RoutingStats::need(&view.stats.gradients, "low-rank-sensitive", "gradients")?;
    let inner = cx.per_task();
    par::map(grouping.groups(), |g| {
        let missing = || Error::shape("gradients of the experts", permutations.len(), all.len());
        let term = |&i: &usize| Some((1.0, all.get(i)?.view(), permutations.get(i)?));
        let terms: Option<Vec<_>> = grouping.members(g).iter().map(term).collect();
        Expert::weighted_sum(&terms.ok_or_else(missing)?, inner.compute())
            .in_expert(grouping.dominants()[g])
    })
}

/// The merged expert of every group of several, `None` for an expert that stays alone; and how the
/// hidden units of all were lined up, of which a lone expert keeps its own order.
fn merge_groups(
    view: &LayerView<'_>,
    measured: &Measured,
    grouping: &Grouping,
    plan: &Plan<'_>,
    cx: &Context,
) -> Result<(Vec<Option<Expert>>, Vec<Permutation>)> {
    let all: Vec<ExpertView<'_>> = view.experts("merge")?.iter().map(Expert::view).collect();
    let mut permutations = line_up(view, measured, grouping, plan, &all, cx)?;
    let inner = cx.per_task();
    let merged = par::map(grouping.groups(), |g| {
        let indices = grouping.members(g);
        if indices.len() == 1 {
            return Ok(None);
        }
        let dominant = grouping.dominants()[g];
        let experts: Vec<_> = indices.iter().map(|&i| all[i].reborrow()).collect();
        let permutations: Vec<_> = indices.iter().map(|&i| permutations[i].clone()).collect();
        let members = Members {
            layer: *view,
            indices: &indices,
            dominant: indices.iter().position(|&i| i == dominant).unwrap_or(0),
            experts: &experts,
            permutations: &permutations,
        };
        merge_one(plan.merger, &members, &inner).in_expert(dominant).map(Some)
    })?;
    for g in 0..grouping.groups() {
        if let [alone] = grouping.members(g)[..] {
            permutations[alone] = Permutation::identity(all[alone].d_ff());
        }
    }
    Ok((merged, permutations))
}

/// Moves the experts that stay alone, bit for bit and in their own order, to their groups.
fn put_alone(
    groups: Vec<Option<Expert>>,
    experts: Vec<Expert>,
    grouping: &Grouping,
) -> Result<Vec<Expert>> {
    let mut originals: Vec<Option<Expert>> = experts.into_iter().map(Some).collect();
    let alone = |(g, merged): (usize, Option<Expert>)| {
        let original = &mut originals[grouping.dominants()[g]];
        let expert = merged.or_else(|| original.take());
        expert.ok_or_else(|| Error::range("dominant expert", "one per group", "one of two groups"))
    };
    groups.into_iter().enumerate().map(alone).collect()
}

pub(crate) fn merge_one(
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

/// One permutation per expert of the layer, identity where nothing has to be lined up.
fn line_up(
    view: &LayerView<'_>,
    measured: &Measured,
    grouping: &Grouping,
    plan: &Plan<'_>,
    all: &[ExpertView<'_>],
    cx: &Context,
) -> Result<Vec<Permutation>> {
    if let Some(permutations) = &measured.permutations {
        return Ok(permutations.clone());
    }
    match plan.alignment {
        None => Ok(all.iter().map(|e| Permutation::identity(e.d_ff())).collect()),
        Some(a) => {
            let table: &SimilarityMatrix = &measured.summary.similarity;
            align::align_groups(&a.aligner, a.reference, view, grouping, Some(table), cx)
        }
    }
}

pub(crate) fn narrow(
    router: &dyn RouterMerger,
    view: &LayerView<'_>,
    grouping: &Grouping,
    plan: &Plan<'_>,
    cx: &Context,
) -> Result<Router> {
    let policy = plan.stock_rule(view.router.rule());
    let source = view.router.select(&(0..view.len()).collect::<Vec<_>>(), policy)?;
    if grouping.is_identity() {
        // Nothing was merged: no method may move a row by its rounding.
        return Ok(source);
    }
    let narrowed = router.merge_router(&view.with_router(&source), grouping, cx)?;
    if narrowed.experts() != grouping.groups() {
        return Err(Error::shape("narrowed router", grouping.groups(), narrowed.experts()));
    }
    Ok(narrowed)
}

/// What the report needs of the layer as it was.
pub(crate) struct Before {
    pub(crate) experts: usize,
    pub(crate) kind: Kind,
    pub(crate) rule: RoutingRule,
    /// Inputs and outputs on which the merged layer is compared.
    pub(crate) outputs: Option<(Array2<f32>, Array2<f32>)>,
}

impl Before {
    fn of(layer: &MoeLayer, stats: &RoutingStats, plan: &Plan<'_>, cx: &Context) -> Result<Self> {
        let wanted = plan.measure_error || plan.recoverer.is_some();
        let samples = stats.samples.as_ref().filter(|_| wanted);
        let outputs = match samples {
            None => None,
            Some(samples) => {
                let exact = layer.routed_output(samples.inputs.view(), cx.compute())?;
                Some((samples.inputs.clone(), exact))
            }
        };
        let (experts, kind) = (layer.experts().len(), Kind::of(&layer.experts()[0]));
        Ok(Self { experts, kind, rule: *layer.router().rule(), outputs })
    }

    fn error_of(&self, merged: &MergedLayer, cx: &Context) -> Result<Option<OutputError>> {
        let Some((inputs, exact)) = &self.outputs else { return Ok(None) };
        let mapped = merged.mapped_output(inputs.view(), cx.compute())?;
        let narrowed = merged.narrowed_output(inputs.view(), cx.compute())?;
        Ok(Some(OutputError {
            mapped: relative_error(mapped.view(), exact.view()),
            narrowed: narrowed.map(|n| relative_error(n.view(), exact.view())),
        }))
    }
}

/// The report of one layer; `router` is the one that chooses afterwards.
pub(crate) fn describe(
    before: &Before,
    grouping: &Grouping,
    router: &Router,
    summary: &LayerSummary,
    output_error: Option<OutputError>,
) -> LayerReport {
    let usage = summary.stats.usage();
    let (groups, dropped) = report::groups_of(grouping, &usage);
    let Before { experts, kind, rule, .. } = before;
    let count = |n: usize| n as u64;
    let (n, m) = (count(*experts), count(grouping.groups()));
    LayerReport {
        layer: summary.id,
        experts: Change { before: n, after: m },
        expert_parameters: Change { before: n * kind.parameters, after: m * kind.parameters },
        flops_per_token: Change {
            before: report::flops_per_token(*kind, rule, *experts),
            after: report::flops_per_token(*kind, router.rule(), router.experts()),
        },
        usage,
        similarity: report::rounded(summary.similarity.similarities()),
        groups,
        dropped,
        output_error,
        compression: None,
        spectra: Vec::new(),
    }
}

/// Announces a phase.
pub(crate) fn announce(
    observer: &dyn Observer,
    ids: &[LayerId],
    at: usize,
    phase: Phase,
) -> LayerId {
    observer.layer_started(ids[at], phase, at, ids.len());
    ids[at]
}
