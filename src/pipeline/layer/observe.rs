//! First half of a layer: statistics, layer-wide alignment where it comes before grouping, and the
//! similarity of every pair of experts.

use crate::align;
use crate::error::{Error, Locate, Result};
use crate::model::{Grouping, LayerId, MoeLayer, Permutation, RoutingStats, SimilarityMatrix};
use crate::par;
use crate::pipeline::layer::source::LayerSource;
use crate::pipeline::layer::stages::LayerStages;
use crate::pipeline::options::{AlignWhen, Alignment};
use crate::stage::{Context, LayerSummary, LayerView, Needs};

/// What grouping needs to know of a layer.
pub(crate) struct ObservedLayer {
    pub(crate) summary: LayerSummary,
    /// Layer-wide alignment, where it comes before grouping.
    pub(crate) permutations: Option<Vec<Permutation>>,
}

/// Observes a layer of `source`, whose experts are read only if a stage needs them.
pub(crate) fn observe_source(
    source: &dyn LayerSource,
    id: LayerId,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<ObservedLayer> {
    let needs = stages.observe_needs();
    let stats = source.stats(id, needs)?;
    let observed = if needs.contains(Needs::EXPERTS) {
        observe_layer(&source.layer(id)?, &stats, stages, cx)?
    } else {
        let router = source.router(id)?;
        stats.validate(router.experts(), router.weight().ncols())?;
        let table = stages.similarity.similarity(&LayerView::new(id, &router, &stats), cx)?;
        ObservedLayer::new(id, table, &stats, None)?
    };
    source.release(id);
    Ok(observed)
}

/// Observes a layer that is in memory.
pub(crate) fn observe_layer(
    layer: &MoeLayer,
    stats: &RoutingStats,
    stages: &LayerStages<'_>,
    cx: &Context,
) -> Result<ObservedLayer> {
    stats.validate(layer.experts().len(), layer.router().weight().ncols())?;
    let view = LayerView::of(layer, stats);
    let Some(a) = before_grouping(stages.alignment) else {
        let table = stages.similarity.similarity(&view, cx)?;
        return ObservedLayer::new(layer.id(), table, stats, None);
    };
    let permutations = align::align_layer(&a.aligner, a.reference, &view, cx)?;
    // Metrics on weights see the aligned experts: that is what aligning first is for.
    let aligned = permuted(layer, &permutations, cx)?;
    let table = stages.similarity.similarity(&LayerView::of(&aligned, stats), cx)?;
    ObservedLayer::new(layer.id(), table, stats, Some(permutations))
}

/// The alignment, if it comes before grouping.
pub(crate) fn before_grouping(alignment: Option<&Alignment>) -> Option<&Alignment> {
    alignment.filter(|a| a.when == AlignWhen::BeforeGrouping)
}

impl ObservedLayer {
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
