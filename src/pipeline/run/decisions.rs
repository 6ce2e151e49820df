//! The first pass: every layer is observed, then the groups of all are decided at once.

use crate::error::{Error, Locate, Result};
use crate::model::{Budget, Grouping, LayerId};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::grouping::group_layers;
use crate::pipeline::layer::observe::{ObservedLayer, observe_source};
use crate::pipeline::layer::process::LayerDecision;
use crate::pipeline::layer::source::LayerSource;
use crate::pipeline::layer::stages::Ranks;
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{LayerProgress, Observer, Phase};
use crate::pipeline::run::checks::{Active, check_shapes};
use crate::stage::LayerView;

/// What the first pass has decided, for the layers that are to be processed.
#[derive(Default)]
pub(crate) struct Decisions {
    pub(crate) layers: Vec<LayerDecision>,
    /// Under a size budget.
    pub(crate) ranks: Option<Ranks>,
}

impl Decisions {
    /// Observes all layers of `source` that take part, and groups them.
    pub(crate) fn make(
        pipeline: &Pipeline,
        source: &dyn LayerSource,
        shapes: &[LayerShape],
        observer: &dyn Observer,
    ) -> Result<Self> {
        let stages = LayerStages::of(pipeline, SampleOrigin::Nowhere);
        let Active { layers: active, target } = check_shapes(pipeline, shapes)?;
        let ids: Vec<LayerId> = active.iter().map(|s| s.id).collect();
        let mut observed = observe(pipeline, source, &ids, observer)?;
        let narrow = pipeline.router.is_some();
        let budget = pipeline.constraints.budget(target, &active, narrow);
        if stages.grouper.surveys() {
            survey(pipeline, source, &mut observed, &budget)?;
        }
        let grouper = stages.grouper;
        let groups = group_layers(grouper, &observed, &active, &budget, narrow, &pipeline.cx)?;
        Ok(Self::of(observed, groups))
    }

    /// Observes some layers whose groups are known.
    pub(crate) fn known(
        pipeline: &Pipeline,
        source: &dyn LayerSource,
        (ids, groupings): (&[LayerId], Vec<Grouping>),
        observer: &dyn Observer,
    ) -> Result<Self> {
        Ok(Self::of(observe(pipeline, source, ids, observer)?, groupings))
    }

    fn of(observed: Vec<ObservedLayer>, groupings: Vec<Grouping>) -> Self {
        let all = observed.into_iter().zip(groupings);
        let layers = all.map(|(observed, grouping)| LayerDecision { observed, grouping });
        Self { layers: layers.collect(), ranks: None }
    }

    /// The layers, in order.
    pub(crate) fn ids(&self) -> Vec<LayerId> {
        self.layers.iter().map(LayerDecision::id).collect()
    }

    /// Layers with their groups, in order.
    pub(crate) fn groups(&self) -> Vec<(LayerId, Grouping)> {
        self.layers.iter().map(|layer| (layer.id(), layer.grouping.clone())).collect()
    }

    /// The decision at a place.
    pub(crate) fn at(&self, at: usize) -> Result<&LayerDecision> {
        self.layers.get(at).ok_or_else(|| Error::range("layer", "one that was decided", at))
    }
}

/// Observes layers, one in memory at a time.
fn observe(
    pipeline: &Pipeline,
    source: &dyn LayerSource,
    ids: &[LayerId],
    observer: &dyn Observer,
) -> Result<Vec<ObservedLayer>> {
    let stages = LayerStages::of(pipeline, SampleOrigin::Nowhere);
    let one = |(done, &layer): (usize, &LayerId)| {
        let total = ids.len();
        LayerProgress { observer, layer, done, total }.started(Phase::Measure);
        observe_source(source, layer, &stages, &pipeline.cx).in_layer(layer)
    };
    ids.iter().enumerate().map(one).collect()
}

/// Lets a grouper that decides by measurement measure every layer, one in memory at a time.
fn survey(
    pipeline: &Pipeline,
    source: &dyn LayerSource,
    observed: &mut [ObservedLayer],
    budget: &Budget,
) -> Result<()> {
    let grouper = &pipeline.grouper;
    for ObservedLayer { summary, .. } in observed {
        let id = summary.id;
        let layer = source.layer(id)?;
        let stats = source.stats(id, grouper.needs())?;
        stats.validate(layer.experts().len(), layer.router().weight().ncols())?;
        let view = LayerView::of(&layer, &stats);
        let found = grouper.survey(&view, &summary.similarity, budget, &pipeline.cx);
        summary.candidates = Some(found.in_layer(id)?);
        source.release(id);
    }
    Ok(())
}
