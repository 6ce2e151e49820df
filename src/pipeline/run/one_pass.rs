//! From text to a merged checkpoint in one pass: every layer is read once.
//!
//! Where it is known beforehand how many experts each layer keeps, layer `l` is observed, decided,
//! merged, recovered and written before layer `l + 1` is read. The statistics come from the text's
//! way through the original model; where a recoverer is fitted on the merged layers
//! ([`RecoverOn`](crate::pipeline::options::RecoverOn)), their stream runs beside it. Both are what
//! the two passes of any other run see, so that the target has the same bytes.

use std::collections::BTreeMap;
use std::path::Path;

use crate::calibrate::Collector;
use crate::checkpoint::{Checkpoint, Partial, Writer};
use crate::error::{Error, Locate, Result};
use crate::model::{Budget, Grouping, LayerId, MergedLayer, RoutingStats, Target};
use crate::pipeline::activations::collect::Watch;
use crate::pipeline::activations::forward_pass::Block;
use crate::pipeline::activations::samples::Seen;
use crate::pipeline::activations::streams::{Streams, Tap};
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::grouping::decide;
use crate::pipeline::layer::process;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{Observer, Phase};
use crate::pipeline::report::{LayerReport, Report};
use crate::pipeline::run::Output;
use crate::pipeline::run::along_text::{Observed, take_moe};
use crate::pipeline::run::resume::hidden_states::{Bookmarks, Marked};
use crate::pipeline::run::resume::journal::{Journal, Line};
use crate::pipeline::run::two_pass::behind;

/// A run in one pass.
#[derive(Clone, Copy)]
pub(crate) struct Once<'a> {
    pub(crate) source: &'a Checkpoint,
    pub(crate) tokens: &'a Tokens,
    pub(crate) output: &'a Output,
    pub(crate) observer: &'a dyn Observer,
}

/// The layers that take part, and how many experts each keeps.
pub(crate) struct Counted {
    layers: Vec<(LayerShape, usize)>,
    budget: Budget,
}

/// The text on its way.
struct Way<'a> {
    streams: Streams<'a>,
    /// The windows that recovery sees; `None` for all.
    recovered: Option<&'a [usize]>,
    /// Layers that were to come at the start.
    total: usize,
}

impl Pipeline {
    /// How many experts every layer keeps, if that is known; else a run takes two passes.
    pub(crate) fn counted(&self, shapes: &[LayerShape]) -> Result<Option<Counted>> {
        if self.size_budget().is_some() || self.grouper.surveys() {
            return Ok(None);
        }
        let (active, target) = self.checked(shapes)?;
        let budget = self.constraints.budget(target, &active, self.router.is_some());
        let sizes: Vec<_> = active.iter().map(|s| (s.id, s.experts)).collect();
        let Some(counts) = self.grouper.counts(&sizes, &budget)? else { return Ok(None) };
        if counts.len() != active.len() {
            return Err(Error::shape("numbers of experts to keep", active.len(), counts.len()));
        }
        Ok(Some(Counted { layers: active.into_iter().zip(counts).collect(), budget }))
    }

    /// Merges in one pass what the journal does not know to be done.
    pub(crate) fn run_once(
        &self,
        once: &Once<'_>,
        counted: &Counted,
        (partial, mut journal): (Partial, Journal),
        target: &Path,
    ) -> Result<Report> {
        let Once { source, tokens, output, observer } = *once;
        let ids: Vec<LayerId> = counted.layers.iter().map(|(shape, _)| shape.id).collect();
        let plan = self.write_plan(source, output, counted.stand_ins()?)?;
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut finished = std::mem::take(&mut journal.layers);
        let from = behind(&writer, &ids, &finished);
        let done = from.and_then(|id| ids.iter().position(|&other| other == id));
        let done = done.map_or(0, |at| at + 1);
        let mut reports = BTreeMap::new();
        let known: BTreeMap<LayerId, Grouping> =
            journal.groups.take().into_iter().flatten().collect();
        for id in &ids[..done] {
            let Some(((report, digest), grouping)) = finished.remove(id).zip(known.get(id)) else {
                return Err(Error::range("finished layer", "one with groups", "none")).in_layer(id);
            };
            writer.regroup(*id, grouping)?;
            writer.adopt(*id, &digest)?;
            reports.insert(*id, report);
        }
        let folder = writer.folder().to_owned();
        let options = self.options(&folder, output.memory);
        let todo = &counted.layers[done..];
        let sink = &mut |layer: MergedLayer, report: &LayerReport| {
            writer.regroup(layer.id, &layer.grouping)?;
            journal.write(&Line::Groups(vec![(layer.id, layer.grouping.clone())]))?;
            writer.layer(&layer)?;
            writer.sync()?;
            let digest = writer.digest(layer.id)?;
            journal.write(&Line::Layer(Box::new(report.clone()), digest))
        };
        let spread = tokens.spread(self.recover_tokens.unwrap_or(usize::MAX));
        if !todo.is_empty() {
            let follows = self.recoverer.is_some() && self.recover_on.follows();
            let followed = follows.then(|| tokens.only(spread.as_deref()));
            let texts = (Some(tokens), followed.as_deref());
            let mut streams = Streams::open(source, texts, &ids, &options)?;
            let mut bookmarks = Bookmarks::new(&folder);
            if let Some(id) = from {
                bookmarks.open(&mut streams, id)?;
            }
            let total = streams.remaining();
            let mut way = Way { streams, recovered: spread.as_deref(), total };
            let new = self.hand_on(&ids[done..], observer, sink, &mut |at| {
                let made = self.next(once, counted, &todo[at], &mut way, &options)?;
                bookmarks.set(&mut way.streams, todo[at].0.id)?;
                Ok(made)
            })?;
            reports.extend(new.into_iter().map(|report| (report.layer, report)));
        }
        let stacks = ids.iter().map(|id| tokens.of(id.stack));
        let shown = (stacks.max().unwrap_or(0), observer);
        self.conclude(source, &plan, reports, (writer, journal), shown, target)
    }

    /// Runs up to the next layer that takes part, and makes it.
    fn next(
        &self,
        once: &Once<'_>,
        counted: &Counted,
        (shape, keep): &(LayerShape, usize),
        way: &mut Way<'_>,
        options: &CalibrateOptions,
    ) -> Result<(MergedLayer, LayerReport)> {
        loop {
            let at = way.total - way.streams.remaining();
            let Some(id) = way.streams.advance()? else { break };
            once.observer.layer_started(id, Phase::Calibrate, at, way.total);
            let mut block = way.streams.read(id)?;
            if id != shape.id {
                way.streams.forward(&block, &self.cx)?;
                continue;
            }
            let (stats, seen) = self.watch(once, way, &block, options)?;
            let layer = take_moe(&mut block)?;
            once.observer.layer_started(id, Phase::Measure, at, way.total);
            let (similarity, alignment) = (&*self.similarity, self.alignment.as_ref());
            let measured = process::measure_layer(&layer, &stats, similarity, alignment, &self.cx)?;
            let grouping = self.decide_one(&measured, shape, *keep, &counted.budget)?;
            once.observer.layer_started(id, Phase::Merge, at, way.total);
            let Some(seen) = seen else {
                let plan = self.plan(true);
                return process::merge_layer(layer, &stats, &measured, &grouping, &plan, &self.cx);
            };
            let (measured, grouping) = (&measured, &grouping);
            let observed = Observed { layer, seen, stats: &stats, measured, grouping };
            return self.recovered(way.streams.merged.as_mut(), &block, observed, None);
        }
        Err(Error::range("layer", "one of the model's, in order", shape.id))
    }

    /// Statistics of the original model, and what the recoverer gets to see.
    fn watch(
        &self,
        once: &Once<'_>,
        way: &mut Way<'_>,
        block: &Block,
        options: &CalibrateOptions,
    ) -> Result<(RoutingStats, Option<Seen>)> {
        let id = block.id();
        let collector = Collector::new(self.needs_along_text())?;
        let mut collector = collector.sample(options.samples, once.tokens.of(id.stack));
        let taps = self.recoverer.is_some() && self.recover_on.taps();
        let mut tap = taps.then(|| Tap::new(way.recovered));
        let mut watch = Watch { collector: &mut collector, tap: tap.as_mut(), cx: &self.cx };
        way.streams.watch(block, &mut watch, &self.cx).in_layer(id)?;
        let seen = way.streams.look(block, tap.map(|tap| tap.seen), &self.cx)?;
        Ok((collector.finish().in_layer(id)?, seen))
    }

    fn decide_one(
        &self,
        measured: &process::Measured,
        shape: &LayerShape,
        keep: usize,
        budget: &Budget,
    ) -> Result<Grouping> {
        let budget = Budget { target: Target::PerLayer(keep), ..budget.clone() };
        let (one, shapes) = (std::slice::from_ref(measured), std::slice::from_ref(shape));
        let narrow = self.router.is_some();
        let mut groupings = decide(&*self.grouper, one, shapes, &budget, narrow, &self.cx)?;
        groupings.pop().ok_or_else(|| Error::shape("groupings", 1, 0))
    }
}

impl Counted {
    /// Groups of the right number, which say where tensors lie; the true ones come later.
    fn stand_ins(&self) -> Result<BTreeMap<LayerId, Grouping>> {
        let one = |(shape, keep): &(LayerShape, usize)| {
            let labels = (0..shape.experts).map(|i| Some(i.min(keep.saturating_sub(1))));
            let grouping = Grouping::new(labels.collect(), (0..*keep).collect());
            Ok((shape.id, grouping.in_layer(shape.id)?))
        };
        self.layers.iter().map(one).collect()
    }
}
