//! A pipeline at work: measure, decide, merge; on layers in memory, and what checkpoints share.

use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{
    Expert, Grouping, LayerId, MergedLayer, MoeLayer, Router, RoutingStats, Target,
};
use crate::par;
use crate::pipeline::builder::{Pipeline, PipelineBuilder};
use crate::pipeline::layer::grouping::decide;
use crate::pipeline::layer::process::{self, Measured, Source};
use crate::pipeline::options::{LayerShape, Plan, check_narrowed};
use crate::pipeline::progress::{Observer, Phase, Silent};
use crate::pipeline::report::{CompressionReport, LayerReport, Report};
use crate::pipeline::size::{Ranks, Room};
use crate::stage::{Needs, Stage};

/// What a run in memory returns.
#[derive(Debug, Clone)]
pub struct Merged {
    /// The merged layers, in the order given; protected layers are unchanged.
    pub layers: Vec<MergedLayer>,
    /// What was done.
    pub report: Report,
}

impl Pipeline {
    /// Starts from nothing.
    pub fn builder() -> PipelineBuilder {
        PipelineBuilder::default()
    }

    /// The statistics that a run needs, over all stages.
    pub fn needs(&self) -> Needs {
        self.measure_needs() | self.similarity.needs() | self.plan(false).merge_needs()
    }

    /// What a run on text collects. Recovery and compression follow the text themselves; without
    /// them samples are what errors are measured on.
    pub(crate) fn needs_along_text(&self) -> Needs {
        let merge = match &self.recoverer {
            Some(recoverer) => self.along_text().merge_needs() | recoverer.needs(),
            None => self.plan(true).merge_needs(),
        };
        // A size budget weighs the matrices of all layers before the first is merged.
        let weighs = self.size_budget().is_some();
        let samples = if weighs { Needs::SAMPLES } else { Needs::NONE };
        self.measure_needs() | self.similarity.needs() | merge | samples
    }

    /// Merges layers that are already in memory: `stats[i]` belongs to `layers[i]`.
    ///
    /// # Errors
    /// [`ErrorKind::Statistics`] when they do not fit, [`ErrorKind::Budget`] when the budget cannot
    /// be met; else those of the stages, with layer and expert.
    ///
    /// # Memory
    /// One more copy of the largest layer, and the merged layers.
    pub fn run(&self, layers: &[MoeLayer], stats: &[RoutingStats]) -> Result<Merged> {
        self.run_observed(layers, stats, &Silent)
    }

    /// [`Pipeline::run`] with an observer.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn run_observed(
        &self,
        layers: &[MoeLayer],
        stats: &[RoutingStats],
        observer: &dyn Observer,
    ) -> Result<Merged> {
        let source = InMemory { layers, stats };
        if layers.len() != stats.len() {
            let reason = format!("{} layers, {} statistics", layers.len(), stats.len());
            return Err(ErrorKind::Statistics { reason }.into());
        }
        let shape = |l: &MoeLayer| LayerShape {
            id: l.id(),
            experts: l.experts().len(),
            rule: *l.router().rule(),
        };
        let shapes: Vec<LayerShape> = layers.iter().map(shape).collect();
        let matrices = |l: &MoeLayer| (l.id(), l.experts()[0].view().up.weight.dim());
        self.check_compression(layers.iter().map(matrices))?;
        let samples = stats.iter().all(|s| s.samples.is_some());
        let mut decided = self.decide(&source, &shapes, observer)?;
        if let Some(budget) = self.size_budget() {
            let room = Room::of_layers(budget, layers, &decided)?;
            decided.ranks =
                Some(self.ranks(&source, &decided, (budget, &room), samples, observer)?);
        }
        let mut merged = Vec::with_capacity(layers.len());
        let reports = self.merge(&source, &decided, samples, observer, &mut |layer, _| {
            merged.push(layer);
            Ok(())
        })?;
        let mut report = self.report(reports);
        report.tokens = stats.iter().map(|s| s.tokens).max().unwrap_or(0);
        let untouched = layers.iter().filter(|l| self.is_protected(l.id())).map(|l| {
            let identity = Grouping::identity(l.experts().len());
            MergedLayer::new(l.id(), l.experts().to_vec(), identity, l.router().clone(), None)
        });
        for layer in untouched {
            merged.push(layer?);
        }
        let position = |id: LayerId| layers.iter().position(|l| l.id() == id);
        merged.sort_by_key(|m| position(m.id));
        observer.finished(&report);
        Ok(Merged { layers: merged, report })
    }

    pub(crate) fn is_protected(&self, id: LayerId) -> bool {
        self.constraints.protect_layers.contains(&id)
    }

    fn measure_needs(&self) -> Needs {
        self.grouper.needs()
    }

    pub(crate) fn plan(&self, samples: bool) -> Plan<'_> {
        let weighs = self.compressor.as_ref().is_some_and(|c| c.uses_inputs());
        Plan {
            merger: &*self.merger,
            router: self.router.as_deref(),
            recoverer: self.recoverer.as_deref(),
            compressor: self.compressor.as_deref(),
            ranks: None,
            moments: samples && weighs,
            alignment: self.alignment.as_ref(),
            routing_groups: self.routing_groups,
            top_k: self.top_k,
            measure_error: samples && self.measure_error,
            measure_spectra: self.measure_spectra,
        }
    }

    /// What the budget asks of the layers that take part; checked before any weight is read.
    pub(crate) fn checked(&self, shapes: &[LayerShape]) -> Result<(Vec<LayerShape>, Target)> {
        self.constraints.check(shapes)?;
        let narrow = self.router.is_some();
        let plan = self.plan(false);
        let mut active: Vec<LayerShape> =
            shapes.iter().filter(|s| !self.is_protected(s.id)).copied().collect();
        if active.is_empty() {
            let reason = "every MoE layer is protected, or there is none".into();
            return Err(ErrorKind::Budget { reason }.into());
        }
        let target = self.keep.target(&active, narrow)?;
        if narrow {
            if active.len() != shapes.len() {
                let reason = "a protected layer keeps all its experts, but a stock export needs \
                              the same number in every layer: protect experts instead, or export \
                              native"
                    .into();
                return Err(ErrorKind::Budget { reason }.into());
            }
            active.iter_mut().for_each(|s| s.rule = plan.stock_rule(&s.rule));
            check_narrowed(&active, target)?;
        }
        Ok((active, target))
    }

    /// Refuses a compression that the matrices `(d_ff, d_model)` of a merged layer do not allow.
    pub(crate) fn check_compression(
        &self,
        layers: impl Iterator<Item = (LayerId, (usize, usize))>,
    ) -> Result<()> {
        let Some(compressor) = &self.compressor else { return Ok(()) };
        let mut active = layers.filter(|(id, _)| !self.is_protected(*id));
        active.try_for_each(|(id, dim)| compressor.storage(dim).map(drop).in_layer(id))
    }

    /// First pass and decision.
    pub(crate) fn decide(
        &self,
        source: &dyn Source,
        shapes: &[LayerShape],
        observer: &dyn Observer,
    ) -> Result<Decided> {
        let (active, target) = self.checked(shapes)?;
        let ids: Vec<LayerId> = active.iter().map(|s| s.id).collect();
        let mut measured = self.measure(source, &ids, observer)?;
        let narrow = self.router.is_some();
        self.survey(source, &mut measured, (&active, target), narrow)?;
        let budget = self.constraints.budget(target, &active, narrow);
        let groupings = decide(&*self.grouper, &measured, &active, &budget, narrow, &self.cx)?;
        Ok(Decided { ids, measured, groupings, ranks: None })
    }

    /// First pass over some layers.
    pub(crate) fn measure(
        &self,
        source: &dyn Source,
        ids: &[LayerId],
        observer: &dyn Observer,
    ) -> Result<Vec<Measured>> {
        let mut measured = Vec::with_capacity(ids.len());
        for at in 0..ids.len() {
            let id = process::announce(observer, ids, at, Phase::Measure);
            let needs = self.measure_needs();
            let alignment = self.alignment.as_ref();
            let one = process::measure(source, id, &*self.similarity, alignment, needs, &self.cx);
            measured.push(one.in_layer(id)?);
        }
        Ok(measured)
    }

    /// Second pass; `sink` receives every merged layer in order, on a thread of its own, so that
    /// one layer is written while the next is merged. At most one layer waits for the sink.
    pub(crate) fn merge(
        &self,
        source: &(dyn Source + Sync),
        decided: &Decided,
        samples: bool,
        observer: &dyn Observer,
        sink: &mut (dyn FnMut(MergedLayer, &LayerReport) -> Result<()> + Send),
    ) -> Result<Vec<LayerReport>> {
        let plan = Plan { ranks: decided.ranks.as_ref(), ..self.plan(samples) };
        self.hand_on(&decided.ids, observer, sink, &mut |at| {
            process::announce(observer, &decided.ids, at, Phase::Merge);
            let (measured, grouping) = decided.at(at)?;
            process::merge(source, measured, grouping, &plan, &self.cx)
        })
    }

    /// Makes every merged layer by `one`, which is told its place among `ids`, and hands it to
    /// `sink`, as [`Pipeline::merge`] says.
    pub(crate) fn hand_on(
        &self,
        ids: &[LayerId],
        observer: &dyn Observer,
        sink: &mut (dyn FnMut(MergedLayer, &LayerReport) -> Result<()> + Send),
        one: &mut MakeLayer<'_>,
    ) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::with_capacity(ids.len());
        // A rendezvous: the sender waits until the layer before has been written.
        let take = |(layer, report): (MergedLayer, LayerReport)| {
            sink(layer, &report).in_layer(report.layer)
        };
        par::producer_consumer(0, take, |send| {
            for (at, id) in ids.iter().enumerate() {
                let (layer, report) = one(at).in_layer(id)?;
                if send.send((layer, report.clone())).is_err() {
                    // The sink has failed, and its error is told.
                    break;
                }
                observer.layer_finished(&report);
                reports.push(report);
            }
            Ok(())
        })?;
        Ok(reports)
    }

    pub(crate) fn report(&self, layers: Vec<LayerReport>) -> Report {
        let name = |kind: &str, stage: &dyn Stage| format!("{kind} {}", stage.name());
        let mut stages = vec![name("similarity", &self.similarity)];
        if let Some(a) = &self.alignment {
            stages.push(name("align", &a.aligner));
        }
        stages.push(name("group", &self.grouper));
        stages.push(name("merge", &self.merger));
        if let Some(router) = &self.router {
            stages.push(name("router", router));
        }
        if let Some(recoverer) = &self.recoverer {
            stages.push(name("recover", recoverer));
        }
        if let Some(compressor) = &self.compressor {
            stages.push(format!("compress {}", compressor.name()));
        }
        Report {
            mcsmoe_version: env!("CARGO_PKG_VERSION").into(),
            family: None,
            recipe: self.recipe.clone(),
            stages,
            device: self.cx.compute().name().into(),
            factorise: self.cx.backend().name().into(),
            seed: self.cx.seed(),
            tokens: 0,
            experts: Report::total(&layers, |l| l.experts),
            expert_parameters: Report::total(&layers, |l| l.expert_parameters),
            flops_per_token: Report::total(&layers, |l| l.flops_per_token),
            compression: CompressionReport::total(&layers),
            written: None,
            layers,
        }
    }
}

/// Makes the merged layer at a place of those that are to be made.
type MakeLayer<'a> = dyn FnMut(usize) -> Result<(MergedLayer, LayerReport)> + 'a;

/// What the first pass decided.
pub(crate) struct Decided {
    pub(crate) ids: Vec<LayerId>,
    pub(crate) measured: Vec<Measured>,
    pub(crate) groupings: Vec<Grouping>,
    /// Under a size budget.
    pub(crate) ranks: Option<Ranks>,
}

impl Decided {
    /// What is known of the layer at a place.
    pub(crate) fn at(&self, at: usize) -> Result<(&Measured, &Grouping)> {
        let found = self.measured.get(at).zip(self.groupings.get(at));
        found.ok_or_else(|| Error::range("layer", "one that was decided", at))
    }
}

struct InMemory<'a> {
    layers: &'a [MoeLayer],
    stats: &'a [RoutingStats],
}

impl InMemory<'_> {
    fn position(&self, id: LayerId) -> Result<usize> {
        let found = self.layers.iter().position(|l| l.id() == id);
        found.ok_or_else(|| Error::range("layer", "one of the layers given", id))
    }
}

impl Source for InMemory<'_> {
    fn router(&self, id: LayerId) -> Result<Router> {
        Ok(self.layers[self.position(id)?].router().clone())
    }

    fn layer(&self, id: LayerId) -> Result<MoeLayer> {
        Ok(self.layers[self.position(id)?].clone())
    }

    fn expert(&self, id: LayerId, i: usize) -> Result<Expert> {
        let experts = self.layers[self.position(id)?].experts();
        let missing = || Error::range("expert", format!("below {}", experts.len()), i);
        experts.get(i).cloned().ok_or_else(missing)
    }

    fn stats(&self, id: LayerId, _needs: Needs) -> Result<RoutingStats> {
        Ok(self.stats[self.position(id)?].clone())
    }
}
