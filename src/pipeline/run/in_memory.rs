//! A run on layers that are in memory.

use crate::error::Result;
use crate::model::{Grouping, LayerId, MergedLayer, MoeLayer, RoutingStats};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::process::{Decision, Experts, LayerInput, process_layer};
use crate::pipeline::layer::source::{LayerSource, MemoryLayers};
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{LayerProgress, Observer};
use crate::pipeline::report::Report;
use crate::pipeline::run::checks::check_compression;
use crate::pipeline::run::decisions::Decisions;
use crate::pipeline::run::output::run_report;
use crate::pipeline::run::size_budget::SizeAccount;
use crate::pipeline::run::write::process_layers;

/// What a run in memory returns.
#[derive(Debug, Clone)]
pub struct Merged {
    /// The merged layers, in the order given; protected layers are unchanged.
    pub layers: Vec<MergedLayer>,
    /// What was done.
    pub report: Report,
}

/// A run on layers in memory: `stats[i]` belongs to `layers[i]`.
pub(crate) struct InMemory<'a> {
    pipeline: &'a Pipeline,
    layers: &'a [MoeLayer],
    stats: &'a [RoutingStats],
    observer: &'a dyn Observer,
}

impl<'a> InMemory<'a> {
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        layers: &'a [MoeLayer],
        stats: &'a [RoutingStats],
        observer: &'a dyn Observer,
    ) -> Self {
        Self { pipeline, layers, stats, observer }
    }

    /// Decides over all layers, then processes each.
    pub(crate) fn run(&self) -> Result<Merged> {
        let Self { pipeline, layers, stats, observer } = *self;
        let source = MemoryLayers::new(layers, stats)?;
        let matrices = |l: &MoeLayer| (l.id(), l.experts()[0].view().up.weight.dim());
        check_compression(pipeline, layers.iter().map(matrices))?;
        let decisions = self.decide(&source)?;
        let stages = self.stages().with_ranks(decisions.ranks.as_ref());
        let ids = decisions.ids();
        let mut merged = Vec::with_capacity(layers.len());
        let mut consume = |layer, _: &_| {
            merged.push(layer);
            Ok(())
        };
        let reports = process_layers(&ids, observer, &mut consume, &mut |at| {
            let decision = decisions.at(at)?;
            let input = LayerInput {
                experts: Experts::InMemory(source.layer(ids[at])?),
                stats: source.stats(ids[at], stages.merge_needs())?,
                samples: None,
                progress: LayerProgress { observer, layer: ids[at], done: at, total: ids.len() },
            };
            process_layer(input, Decision::Made(decision), &stages, &pipeline.cx)?.in_memory()
        })?;
        for layer in layers.iter().filter(|l| pipeline.is_protected(l.id())) {
            let (experts, identity) = (layer.experts().to_vec(), layer.experts().len());
            let identity = Grouping::identity(identity);
            let router = layer.router().clone();
            merged.push(MergedLayer::new(layer.id(), experts, identity, router, None)?);
        }
        let position = |id: LayerId| layers.iter().position(|l| l.id() == id);
        merged.sort_by_key(|m| position(m.id));
        let mut report = run_report(pipeline, reports);
        report.tokens = stats.iter().map(|s| s.tokens).max().unwrap_or(0);
        observer.finished(&report);
        Ok(Merged { layers: merged, report })
    }

    fn stages(&self) -> LayerStages<'a> {
        let samples = self.stats.iter().all(|s| s.samples.is_some());
        let origin = if samples { SampleOrigin::Statistics } else { SampleOrigin::Nowhere };
        LayerStages::of(self.pipeline, origin)
    }

    fn decide(&self, source: &MemoryLayers<'_>) -> Result<Decisions> {
        let shape = |l: &MoeLayer| LayerShape {
            id: l.id(),
            experts: l.experts().len(),
            rule: *l.router().rule(),
        };
        let shapes: Vec<LayerShape> = self.layers.iter().map(shape).collect();
        let mut decisions = Decisions::make(self.pipeline, source, &shapes, self.observer)?;
        if let Some(budget) = self.pipeline.size_budget() {
            let room = SizeAccount::of_layers(budget, self.layers, &decisions)?;
            let (stages, cx) = (self.stages(), &self.pipeline.cx);
            decisions.ranks = Some(room.ranks(&stages, source, &decisions, self.observer, cx)?);
        }
        Ok(decisions)
    }
}
