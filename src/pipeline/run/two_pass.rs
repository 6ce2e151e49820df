//! A run in two passes: observe and decide over all layers, then process each that is not yet done.

use std::collections::BTreeMap;

use crate::align;
use crate::calibrate::StatsFile;
use crate::checkpoint::{WritePlan, Writer};
use crate::error::Result;
use crate::model::{Grouping, LayerId};
use crate::pipeline::activations::collect::calibrate;
use crate::pipeline::activations::tokens::Tokens;
use crate::pipeline::layer::by_group::ExpertsByGroup;
use crate::pipeline::layer::process::{
    Decision, Experts, LayerInput, ProcessedLayer, process_layer,
};
use crate::pipeline::layer::source::{CheckpointLayers, LayerSource};
use crate::pipeline::layer::stages::Ranks;
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::progress::LayerProgress;
use crate::pipeline::report::{LayerReport, Report};
use crate::pipeline::run::along_text::AlongText;
use crate::pipeline::run::decisions::Decisions;
use crate::pipeline::run::output::{plan_factors, write_plan};
use crate::pipeline::run::resume::journal::{Journal, Line};
use crate::pipeline::run::resume::{fingerprint, last_resumable_layer, remove_hidden};
use crate::pipeline::run::size_budget::SizeAccount;
use crate::pipeline::run::write::{RecordLayer, process_by_group, process_layers, write_layer};
use crate::pipeline::run::{CheckpointRun, PartialRun};
use crate::stage::Needs;

/// How the second pass goes from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SecondPass {
    /// One whole layer in memory at a time.
    WholeLayers,
    /// One group per thread in memory: no stage sees a whole layer.
    ByGroup,
    /// Whole layers, along the text on which each is recovered.
    AlongText,
}

impl SecondPass {
    /// The way for a run on statistics.
    pub(crate) fn of(run: &CheckpointRun<'_>, origin: SampleOrigin) -> Self {
        let stages = LayerStages::of(run.pipeline, origin);
        // Large experts of few groups are aligned faster with all of the layer's pairs at once.
        let hidden = run.source.layers().iter().map(|layer| layer.d_ff).max();
        let small = hidden.is_none_or(|d_ff| d_ff <= align::PARALLEL_THRESHOLD);
        match stages.works_by_group() && (stages.in_groups().is_none() || small) {
            true => Self::ByGroup,
            false => Self::WholeLayers,
        }
    }
}

/// A run in two passes.
pub(crate) struct TwoPass<'a> {
    run: &'a CheckpointRun<'a>,
    stats: &'a StatsFile,
    /// The text, when the statistics come from it.
    text: Option<&'a Tokens>,
    second: SecondPass,
}

impl<'a> TwoPass<'a> {
    pub(crate) fn new(
        run: &'a CheckpointRun<'a>,
        stats: &'a StatsFile,
        text: Option<&'a Tokens>,
        second: SecondPass,
    ) -> Self {
        Self { run, stats, text, second }
    }

    /// Decides, or takes the decision of the run that is resumed, and processes what is not done.
    pub(crate) fn run(&self, partial: PartialRun) -> Result<Report> {
        let CheckpointRun { pipeline, source, output, observer, .. } = *self.run;
        let PartialRun { partial, mut journal } = partial;
        let (groups, fresh) = match journal.groups.take() {
            Some(groups) => (groups, None),
            None => {
                let made = Decisions::make(pipeline, &self.layers(), &self.run.shapes, observer)?;
                journal.write(&Line::Groups(made.groups()))?;
                (made.groups(), Some(made))
            }
        };
        let mut plan = write_plan(pipeline, source, output, groups.into_iter().collect())?;
        let ranks = self.ranks(&plan, fresh.as_ref(), &mut journal)?;
        if ranks.is_some() {
            plan_factors(pipeline, source, &mut plan, ranks.as_ref())?;
        }
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut reports = BTreeMap::new();
        let mut finished = std::mem::take(&mut journal.layers);
        let mut resume_after = None;
        if self.second == SecondPass::AlongText {
            // A recovered layer depends on all before it, and the states behind it on itself.
            let ids = &self.run.ids;
            resume_after = last_resumable_layer(&writer, ids, &finished);
            let place = |id: LayerId| ids.iter().position(|&other| other == id);
            finished.retain(|&id, _| resume_after.is_some_and(|last| place(id) <= place(last)));
        }
        for (id, (report, digest)) in finished.into_iter().filter(|_| fresh.is_none()) {
            if writer.adopt(id, &digest)? {
                reports.insert(id, report);
            }
        }
        let mut decisions = match fresh {
            Some(decisions) => decisions,
            None => self.remaining(&plan, &reports)?,
        };
        decisions.ranks = ranks;
        let record = &mut |report: &LayerReport, digest| {
            journal.write(&Line::Layer(Box::new(report.clone()), digest))
        };
        let new = self.process(&decisions, resume_after, &mut writer, record)?;
        reports.extend(new.into_iter().map(|report| (report.layer, report)));
        self.run.finish(&plan, reports, (writer, journal), self.stats.tokens())
    }

    /// The second pass: processes the decided layers and writes them; `record` is told of each that
    /// is on the disk.
    pub(crate) fn process(
        &self,
        decisions: &Decisions,
        resume_after: Option<LayerId>,
        writer: &mut Writer<'_>,
        record: &mut RecordLayer<'_>,
    ) -> Result<Vec<LayerReport>> {
        let CheckpointRun { pipeline, observer, .. } = *self.run;
        let (layers, ids) = (self.layers(), decisions.ids());
        let stages = LayerStages::of(pipeline, self.sample_origin());
        let stages = stages.with_ranks(decisions.ranks.as_ref());
        match (self.second, self.text) {
            (SecondPass::AlongText, Some(tokens)) => {
                let most = pipeline.recover_tokens.unwrap_or(usize::MAX);
                let tokens = &*tokens.only(tokens.spread(most).as_deref());
                let along = AlongText { run: self.run, stats: self.stats, tokens, resume_after };
                along.run(decisions, writer, record)
            }
            (SecondPass::ByGroup, _) => {
                process_by_group(&ids, observer, writer, record, &mut |at, sink| {
                    let by_group = ExpertsByGroup { source: &layers, sink };
                    let experts = Experts::ByGroup(layers.router(ids[at])?, by_group);
                    self.process_one(at, experts, decisions, &stages)
                })
            }
            _ => {
                let mut consume =
                    |layer, report: &LayerReport| write_layer(writer, &layer, report, record);
                process_layers(&ids, observer, &mut consume, &mut |at| {
                    let experts = Experts::InMemory(layers.layer(ids[at])?);
                    let made = self.process_one(at, experts, decisions, &stages)?.in_memory();
                    layers.release(ids[at]);
                    made
                })
            }
        }
    }

    fn process_one(
        &self,
        done: usize,
        experts: Experts<'_>,
        decisions: &Decisions,
        stages: &LayerStages<'_>,
    ) -> Result<ProcessedLayer> {
        let decision = decisions.at(done)?;
        let (layer, total, observer) = (decision.id(), decisions.layers.len(), self.run.observer);
        let stats = self.layers().stats(layer, stages.merge_needs())?;
        let progress = LayerProgress { observer, layer, done, total };
        let input = LayerInput { experts, stats, samples: None, progress };
        process_layer(input, Decision::Made(decision), stages, &self.run.pipeline.cx)
    }

    fn layers(&self) -> CheckpointLayers<'a> {
        CheckpointLayers { source: self.run.source, stats: self.stats }
    }

    fn sample_origin(&self) -> SampleOrigin {
        self.run.sample_origin(self.stats)
    }

    /// The layers that a resumed run has still to process, observed again.
    fn remaining(
        &self,
        plan: &WritePlan,
        done: &BTreeMap<LayerId, LayerReport>,
    ) -> Result<Decisions> {
        let open = |id: &&LayerId| !done.contains_key(id) && plan.groupings.contains_key(id);
        let ids: Vec<LayerId> = self.run.ids.iter().filter(open).copied().collect();
        let groupings: Vec<Grouping> =
            ids.iter().filter_map(|id| plan.groupings.get(id).cloned()).collect();
        let known = (&ids[..], groupings);
        Decisions::known(self.run.pipeline, &self.layers(), known, self.run.observer)
    }

    /// The ranks of a size budget, or those that the run that is resumed has found.
    fn ranks(
        &self,
        plan: &WritePlan,
        fresh: Option<&Decisions>,
        journal: &mut Journal,
    ) -> Result<Option<Ranks>> {
        let CheckpointRun { pipeline, source, observer, .. } = *self.run;
        let Some(budget) = pipeline.size_budget() else { return Ok(None) };
        if let Some(known) = journal.ranks.take() {
            return Ok(Some(known.into_iter().collect()));
        }
        let room = SizeAccount::of_folder(budget, source, plan)?;
        let again;
        let decisions = match fresh {
            Some(decisions) => decisions,
            None => {
                again = self.remaining(plan, &BTreeMap::new())?;
                &again
            }
        };
        let stages = LayerStages::of(pipeline, self.sample_origin());
        let ranks = room.ranks(&stages, &self.layers(), decisions, observer, &pipeline.cx)?;
        journal.write(&Line::Ranks(ranks.clone().into_iter().collect()))?;
        Ok(Some(ranks))
    }
}

/// Statistics of a text, collected into the partial folder, or those that the run that is resumed
/// has collected.
pub(crate) fn collect_statistics(
    run: &CheckpointRun<'_>,
    tokens: &Tokens,
    partial: &mut PartialRun,
) -> Result<StatsFile> {
    /// Hidden, as everything that does not belong to the target.
    const STATISTICS: &str = ".mcsmoe.statistics.safetensors";
    let CheckpointRun { pipeline, source, output, observer, .. } = *run;
    let folder = partial.partial.path().to_owned();
    let path = folder.join(STATISTICS);
    let known = partial.journal.statistics.take();
    if known.is_none() || fingerprint::of_file(&path).ok() != known {
        remove_hidden(&folder)?;
        let options = run.text_options(&folder, output.memory);
        let needs = pipeline.needs_along_text();
        calibrate(source, tokens, needs).options(options).observer(observer).write(&path)?;
        partial.journal.write(&Line::Statistics(fingerprint::of_file(&path)?))?;
    }
    StatsFile::open(&path)
}

/// Whether the statistics hold samples of all layers that take part.
pub(crate) fn sample_origin(stats: &StatsFile, ids: &[LayerId]) -> SampleOrigin {
    match ids.iter().all(|id| stats.available(id).contains(Needs::SAMPLES)) {
        true => SampleOrigin::Statistics,
        false => SampleOrigin::Nowhere,
    }
}
