//! From text to a merged checkpoint in one pass: every layer is read once.
//!
//! Where it is known beforehand how many experts each layer keeps, layer `l` is observed, decided,
//! merged, recovered and written before layer `l + 1` is read. The statistics come from the text's
//! way through the original model; where a recoverer is fitted on the merged layers
//! ([`RecoverOn`](crate::pipeline::options::RecoverOn)), a second stream of hidden states follows
//! them. Both are what the two passes of any other run see, so that the target has the same bytes.

use std::collections::BTreeMap;

use crate::calibrate::Collector;
use crate::checkpoint::Writer;
use crate::error::{Error, Locate, Result};
use crate::model::{Budget, Grouping, LayerId, MergedLayer, RoutingStats};
use crate::pipeline::activations::collect::CollectedLayer;
use crate::pipeline::activations::forward_pass::LoadedLayer;
use crate::pipeline::activations::samples::LayerSamples;
use crate::pipeline::activations::streams::{ResumableStates, SampleCapture, Streams};
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::process::{Decision, Experts, LayerInput, LayerShare, process_layer};
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{LayerProgress, Phase};
use crate::pipeline::report::{LayerReport, Report};
use crate::pipeline::run::checks::{Active, check_shapes};
use crate::pipeline::run::output::write_plan;
use crate::pipeline::run::resume::hidden_states::SavedStates;
use crate::pipeline::run::resume::journal::Line;
use crate::pipeline::run::resume::last_resumable_layer;
use crate::pipeline::run::write::{process_layers, write_layer};
use crate::pipeline::run::{CheckpointRun, PartialRun};

/// A run in one pass.
pub(crate) struct OnePass<'a> {
    run: &'a CheckpointRun<'a>,
    tokens: &'a Tokens,
    counts: KnownCounts,
}

/// The layers that take part, and how many experts each keeps.
pub(crate) struct KnownCounts {
    layers: Vec<(LayerShape, usize)>,
    budget: Budget,
}

/// The text between two layers.
struct Position<'a> {
    streams: Streams<'a>,
    saved: SavedStates<'a>,
    /// The windows that recovery sees; `None` for all.
    recovered: Option<&'a [usize]>,
    /// Layers that were to come at the start.
    total: usize,
}

impl KnownCounts {
    /// How many experts every layer keeps, if that is known before any layer is observed.
    pub(crate) fn of(pipeline: &Pipeline, shapes: &[LayerShape]) -> Result<Option<Self>> {
        if pipeline.size_budget().is_some() || pipeline.grouper.surveys() {
            return Ok(None);
        }
        let Active { layers: active, target } = check_shapes(pipeline, shapes)?;
        let budget = pipeline.constraints.budget(target, &active, pipeline.router.is_some());
        let sizes: Vec<_> = active.iter().map(|s| (s.id, s.experts)).collect();
        let Some(counts) = pipeline.grouper.counts(&sizes, &budget)? else { return Ok(None) };
        if counts.len() != active.len() {
            return Err(Error::shape("numbers of experts to keep", active.len(), counts.len()));
        }
        Ok(Some(Self { layers: active.into_iter().zip(counts).collect(), budget }))
    }

    fn ids(&self) -> Vec<LayerId> {
        self.layers.iter().map(|(shape, _)| shape.id).collect()
    }

    /// Groups of the right number, which say where tensors lie; the true ones come later.
    fn placeholders(&self) -> Result<BTreeMap<LayerId, Grouping>> {
        let one = |(shape, keep): &(LayerShape, usize)| {
            let labels = (0..shape.experts).map(|i| Some(i.min(keep.saturating_sub(1))));
            let grouping = Grouping::new(labels.collect(), (0..*keep).collect());
            Ok((shape.id, grouping.in_layer(shape.id)?))
        };
        self.layers.iter().map(one).collect()
    }
}

impl<'a> OnePass<'a> {
    pub(crate) fn new(run: &'a CheckpointRun<'a>, tokens: &'a Tokens, counts: KnownCounts) -> Self {
        Self { run, tokens, counts }
    }

    /// Processes what the journal does not know to be done.
    pub(crate) fn run(&self, partial: PartialRun) -> Result<Report> {
        let CheckpointRun { pipeline, source, output, observer, .. } = *self.run;
        let PartialRun { partial, mut journal } = partial;
        let ids = self.counts.ids();
        let plan = write_plan(pipeline, source, output, self.counts.placeholders()?)?;
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut finished = std::mem::take(&mut journal.layers);
        let resume_after = last_resumable_layer(&writer, &ids, &finished);
        let done = resume_after.and_then(|id| ids.iter().position(|&other| other == id));
        let done = done.map_or(0, |at| at + 1);
        let mut reports = BTreeMap::new();
        let known: BTreeMap<LayerId, Grouping> =
            journal.groups.take().into_iter().flatten().collect();
        for id in &ids[..done] {
            let Some(((report, digest), grouping)) = finished.remove(id).zip(known.get(id)) else {
                return Err(Error::range("finished layer", "one with groups", "none"))
                    .in_layer(*id);
            };
            writer.regroup(*id, grouping)?;
            writer.adopt(*id, &digest)?;
            reports.insert(*id, report);
        }
        let folder = writer.folder().to_owned();
        let options = self.run.text_options(&folder, output.memory);
        let mut consume = |layer: MergedLayer, report: &LayerReport| {
            writer.regroup(layer.id, &layer.grouping)?;
            journal.write(&Line::Groups(vec![(layer.id, layer.grouping.clone())]))?;
            write_layer(&mut writer, &layer, report, &mut |report, digest| {
                journal.write(&Line::Layer(Box::new(report.clone()), digest))
            })
        };
        if done < ids.len() {
            let spread = self.tokens.spread(pipeline.recover_tokens.unwrap_or(usize::MAX));
            let follows = pipeline.recoverer.is_some() && pipeline.recover_on.follows();
            let followed = follows.then(|| self.tokens.only(spread.as_deref()));
            let texts = (Some(self.tokens), followed.as_deref());
            let mut streams = Streams::open(source, texts, &ids, &options)?;
            let mut saved = SavedStates::new(&folder);
            if let Some(id) = resume_after {
                saved.restore(&mut streams, id)?;
            }
            let total = streams.remaining();
            let recovered = spread.as_deref();
            let mut position = Position { streams, saved, recovered, total };
            let todo = &self.counts.layers[done..];
            let new = process_layers(&ids[done..], observer, &mut consume, &mut |at| {
                self.next(&todo[at], &mut position, &options)
            })?;
            reports.extend(new.into_iter().map(|report| (report.layer, report)));
        }
        let stacks = ids.iter().map(|id| self.tokens.of(id.stack));
        let tokens = stacks.max().unwrap_or(0);
        self.run.finish(&plan, reports, (writer, journal), tokens)
    }

    /// Runs the text up to the next layer that takes part, and processes it.
    fn next(
        &self,
        (shape, keep): &(LayerShape, usize),
        position: &mut Position<'_>,
        options: &CalibrateOptions,
    ) -> Result<(MergedLayer, LayerReport)> {
        let CheckpointRun { pipeline, observer, .. } = *self.run;
        let (id, cx, total) = (shape.id, &pipeline.cx, position.total);
        let mut done = total - position.streams.remaining();
        let mut block = position.streams.advance_to(id, cx, &mut |layer| {
            LayerProgress { observer, layer, done, total }.started(Phase::Calibrate);
            done += 1;
        })?;
        let (stats, samples) = self.observe(position, &block, options)?;
        let input = LayerInput {
            experts: Experts::InMemory(block.take_experts()?),
            stats,
            samples: samples.as_ref(),
            progress: LayerProgress { observer, layer: id, done: done - 1, total },
        };
        let share = LayerShare { shape: *shape, keep: *keep, budget: &self.counts.budget };
        let stages = self.stages(samples.is_some());
        let processed = process_layer(input, Decision::Alone(share), &stages, cx)?;
        let (merged, report) = processed.in_memory()?;
        if let Some(samples) = samples {
            let narrowed = pipeline.router.is_some();
            position.streams.leave(&block, samples, (&merged, narrowed), cx)?;
        }
        position.saved.save(&mut position.streams, id)?;
        Ok((merged, report))
    }

    fn stages(&self, along_text: bool) -> LayerStages<'_> {
        let origin = if along_text { SampleOrigin::Text } else { SampleOrigin::Statistics };
        LayerStages::of(self.run.pipeline, origin)
    }

    /// Statistics of the original model, and inputs and outputs for the recoverer, if there is one.
    fn observe(
        &self,
        position: &mut Position<'_>,
        block: &LoadedLayer,
        options: &CalibrateOptions,
    ) -> Result<(RoutingStats, Option<LayerSamples>)> {
        let pipeline = self.run.pipeline;
        let (id, cx) = (block.id(), &pipeline.cx);
        let collector = Collector::new(pipeline.needs_along_text())?;
        let mut collector = collector.sample(options.samples, self.tokens.of(id.stack));
        let captures = pipeline.recoverer.is_some() && pipeline.recover_on.captures_original();
        let mut capture = captures.then(|| SampleCapture::new(position.recovered));
        let mut collected =
            CollectedLayer { collector: &mut collector, capture: capture.as_mut(), cx };
        position.streams.observe_original(block, &mut collected, cx).in_layer(id)?;
        let captured = capture.map(SampleCapture::into_samples);
        let samples = position.streams.capture_merged(block, captured, cx)?;
        Ok((collector.finish().in_layer(id)?, samples))
    }
}
