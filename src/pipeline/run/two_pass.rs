//! A checked run in its partial folder: collect, decide, merge what is not yet done, seal.

use std::collections::BTreeMap;
use std::path::Path;

use crate::align;
use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, Export, Factoring, Partial, WritePlan, Writer, Written};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Grouping, LayerId, MergedLayer, MoeLayer, Router, RoutingStats};
use crate::pipeline::activations::collect::calibrate_to_file_observed;
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::process::Source;
use crate::pipeline::options::{AlignWhen, LayerShape, RoutingGroupPolicy};
use crate::pipeline::progress::Observer;
use crate::pipeline::report::{Change, LayerReport, Report, WrittenReport};
use crate::pipeline::run::Output;
use crate::pipeline::run::in_memory::Decided;
use crate::pipeline::run::resume::fingerprint;
use crate::pipeline::run::resume::hidden_states::Bookmarks;
use crate::pipeline::run::resume::journal::{Journal, Line};
use crate::pipeline::size::{Ranks, Room};
use crate::stage::{ExpertStorage, Needs};

impl Pipeline {
    /// Statistics of the text, in the partial folder.
    pub(crate) fn collect(
        &self,
        source: &Checkpoint,
        tokens: &Tokens,
        journal: &mut Journal,
        (folder, memory): (&Path, u64),
        observer: &dyn Observer,
    ) -> Result<StatsFile> {
        let path = folder.join(STATISTICS);
        let known = journal.statistics.take();
        if known.is_none() || fingerprint::of_file(&path).ok() != known {
            remove_hidden(folder)?;
            let options = self.options(folder, memory);
            let needs = self.needs_along_text();
            calibrate_to_file_observed(source, tokens, needs, &options, &path, observer)?;
            journal.write(&Line::Statistics(fingerprint::of_file(&path)?))?;
        }
        StatsFile::open(&path)
    }

    /// How text runs through a model during a run whose partial folder is `folder`.
    pub(crate) fn options(&self, folder: &Path, memory: u64) -> CalibrateOptions {
        CalibrateOptions {
            memory,
            scratch: folder.into(),
            cx: self.cx.clone(),
            ..CalibrateOptions::default()
        }
    }

    /// Decides, or takes the decision of the run that is resumed, and merges what is not yet done.
    pub(crate) fn run_job(
        &self,
        job: &Job<'_>,
        partial: Partial,
        mut journal: Journal,
        target: &Path,
    ) -> Result<Report> {
        let Job { source, stats, observer, .. } = *job;
        let samples = job.ids.iter().all(|id| stats.available(id).contains(Needs::SAMPLES));
        let folder = Folder { source, stats };
        let (groups, fresh) = match journal.groups.take() {
            Some(groups) => (groups, None),
            None => {
                let decided = self.decide(&folder, job.shapes, observer)?;
                let groups: Vec<_> =
                    decided.ids.iter().copied().zip(decided.groupings.clone()).collect();
                journal.write(&Line::Groups(groups.clone()))?;
                (groups, Some(decided))
            }
        };
        let groupings: BTreeMap<LayerId, Grouping> = groups.into_iter().collect();
        let mut plan = self.write_plan(source, job.output, groupings)?;
        let ranks = self.job_ranks(&folder, job, &plan, fresh.as_ref(), samples, &mut journal)?;
        if ranks.is_some() {
            self.factor(source, &mut plan, ranks.as_ref())?;
        }
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut reports = BTreeMap::new();
        let followed = job.tokens.filter(|_| self.recoverer.is_some());
        let mut finished = std::mem::take(&mut journal.layers);
        let mut from = None;
        if followed.is_some() {
            // A recovered layer depends on all before it, and the states behind it on itself.
            from = behind(&writer, job.ids, &finished);
            let place = |id: LayerId| job.ids.iter().position(|&other| other == id);
            finished.retain(|&id, _| from.is_some_and(|from| place(id) <= place(from)));
        }
        for (id, (report, digest)) in finished.into_iter().filter(|_| fresh.is_none()) {
            if writer.adopt(id, &digest)? {
                reports.insert(id, report);
            }
        }
        let mut decided = match fresh {
            Some(decided) => decided,
            None => self.rest(&folder, job, &plan, &reports)?,
        };
        decided.ranks = ranks;
        let line = &mut |report: &LayerReport, digest| {
            journal.write(&Line::Layer(Box::new(report.clone()), digest))
        };
        let most = self.recover_tokens.unwrap_or(usize::MAX);
        let some = followed.map(|tokens| tokens.only(tokens.spread(most).as_deref()));
        let followed = some.as_deref().map(|tokens| (tokens, from));
        let new = self.write_layers(job, followed, (&decided, samples), &mut writer, line)?;
        reports.extend(new.into_iter().map(|report| (report.layer, report)));
        let shown = (job.stats.tokens(), observer);
        self.conclude(source, &plan, reports, (writer, journal), shown, target)
    }

    /// Merges the decided layers and writes them; `line` is told of each that is on the disk, with
    /// its digest.
    pub(crate) fn write_layers(
        &self,
        job: &Job<'_>,
        followed: Option<(&Tokens, Option<LayerId>)>,
        (decided, samples): (&Decided, bool),
        writer: &mut Writer<'_>,
        line: &mut (dyn FnMut(&LayerReport, String) -> Result<()> + Send),
    ) -> Result<Vec<LayerReport>> {
        let folder = Folder { source: job.source, stats: job.stats };
        if self.streams(samples, job) {
            return self.stream(&folder, decided, writer, job.observer, line);
        }
        let options = self.options(writer.folder(), job.output.memory);
        let sink = &mut |layer: MergedLayer, report: &LayerReport| {
            writer.layer(&layer)?;
            writer.sync()?;
            line(report, writer.digest(layer.id)?)
        };
        match followed {
            Some(followed) => self.follow(job, followed, &options, decided, sink),
            None => self.merge(&folder, decided, samples, job.observer, sink),
        }
    }

    /// Reports, seals, and gives the target its name.
    pub(crate) fn conclude(
        &self,
        source: &Checkpoint,
        plan: &WritePlan,
        reports: BTreeMap<LayerId, LayerReport>,
        (mut writer, mut journal): (Writer<'_>, Journal),
        (tokens, observer): (u64, &dyn Observer),
        target: &Path,
    ) -> Result<Report> {
        let mut report = self.report(reports.into_values().collect());
        report.family = Some(source.family().into());
        report.tokens = tokens;
        report.written = Some(summary(source, plan, writer.written()));
        let json = serde_json::to_value(&report).unwrap_or_default();
        writer.seal(&json)?;
        remove_hidden(writer.folder())?;
        journal.write(&Line::Whole(Box::new(report.clone())))?;
        drop(journal);
        writer.commit()?;
        Journal::remove(target)?;
        observer.finished(&report);
        Ok(report)
    }

    /// The layers that a resumed run has still to merge, measured again.
    fn rest(
        &self,
        folder: &Folder<'_>,
        job: &Job<'_>,
        plan: &WritePlan,
        done: &BTreeMap<LayerId, LayerReport>,
    ) -> Result<Decided> {
        let open = |id: &&LayerId| !done.contains_key(id) && plan.groupings.contains_key(id);
        let ids: Vec<LayerId> = job.ids.iter().filter(open).copied().collect();
        let measured = self.measure(folder, &ids, job.observer)?;
        let groupings = ids.iter().filter_map(|id| plan.groupings.get(id).cloned()).collect();
        Ok(Decided { ids, measured, groupings, ranks: None })
    }

    /// Whether no stage has to see a whole layer at once.
    fn streams(&self, samples: bool, job: &Job<'_>) -> bool {
        let plan = self.plan(samples);
        let in_groups = self.alignment.as_ref().filter(|a| a.when == AlignWhen::InGroups);
        let hidden = job.source.layers().iter().map(|layer| layer.d_ff).max();
        !plan.measure_error
            && plan.measure_spectra != Some(true)
            && plan.recoverer.is_none()
            && plan.compressor.is_none()
            && !plan.merge_needs().contains(Needs::EXPERTS)
            && (in_groups.is_none() || hidden.is_none_or(|d_ff| d_ff <= align::PARALLEL_THRESHOLD))
    }

    /// What to write for some groups. What a size budget leaves of each matrix depends on the
    /// weights and is not yet in it.
    pub(crate) fn write_plan(
        &self,
        source: &Checkpoint,
        output: &Output,
        groupings: BTreeMap<LayerId, Grouping>,
    ) -> Result<WritePlan> {
        let mut plan = WritePlan {
            export: output.export.into(),
            groupings,
            top_k: self.top_k,
            flatten_groups: self.routing_groups == RoutingGroupPolicy::Flatten,
            factored: BTreeMap::new(),
            d_ff: None,
            shard_bytes: output.shard_bytes,
            only: None,
        };
        if self.size_budget().is_none() {
            self.factor(source, &mut plan, None)?;
        }
        Ok(plan)
    }

    /// Writes the compressor's factors into the plan.
    fn factor(
        &self,
        source: &Checkpoint,
        plan: &mut WritePlan,
        ranks: Option<&Ranks>,
    ) -> Result<()> {
        let Some(compressor) = &self.compressor else { return Ok(()) };
        for layer in source.layers() {
            let Some(grouping) = plan.groupings.get(&layer.id) else { continue };
            let (groups, dim) = (grouping.groups(), (layer.d_ff, layer.d_model));
            let storage = compressor.storage(dim).in_layer(layer.id)?;
            let same = storage.matrices(layer.gated);
            let same = same.map(|kept| Factoring::new(vec![kept; groups]));
            let allocated = ranks.and_then(|ranks| ranks.get(&layer.id)).cloned();
            if let Some(kept) = same.or(allocated) {
                plan.factored.insert(layer.id, kept);
            }
            if let ExpertStorage::HiddenUnits(units) = storage {
                plan.d_ff = Some(units);
            }
        }
        Ok(())
    }

    /// The ranks of a size budget, or those that the run that is resumed has found.
    fn job_ranks(
        &self,
        folder: &Folder<'_>,
        job: &Job<'_>,
        plan: &WritePlan,
        fresh: Option<&Decided>,
        samples: bool,
        journal: &mut Journal,
    ) -> Result<Option<Ranks>> {
        let Some(budget) = self.size_budget() else { return Ok(None) };
        if let Some(known) = journal.ranks.take() {
            return Ok(Some(known.into_iter().collect()));
        }
        let room = Room::of_folder(budget, job.source, plan)?;
        let again;
        let decided = match fresh {
            Some(decided) => decided,
            None => {
                again = self.rest(folder, job, plan, &BTreeMap::new())?;
                &again
            }
        };
        let ranks = self.ranks(folder, decided, (budget, &room), samples, job.observer)?;
        journal.write(&Line::Ranks(ranks.clone().into_iter().collect()))?;
        Ok(Some(ranks))
    }
}

/// The last layer that lies whole in the folder with all before it, and the states behind it, which
/// nothing needs behind the very last.
pub(crate) fn behind(
    writer: &Writer<'_>,
    ids: &[LayerId],
    finished: &BTreeMap<LayerId, (LayerReport, String)>,
) -> Option<LayerId> {
    let whole = |id: &LayerId| {
        finished.get(id).is_some_and(|(_, digest)| writer.digest(*id).ok().as_ref() == Some(digest))
    };
    let count = ids.iter().take_while(|id| whole(id)).count();
    if count == ids.len() {
        return ids.last().copied();
    }
    Bookmarks::last_of(writer.folder(), &ids[..count])
}

/// Statistics of text, while a run lasts. Hidden, as everything that does not belong to the target.
const STATISTICS: &str = ".mcsmoe.statistics.safetensors";

/// Removes files that do not belong to the target.
fn remove_hidden(folder: &Path) -> Result<()> {
    let io = |e| Error::io("clear partial folder", e);
    for entry in std::fs::read_dir(folder).map_err(io).in_file(folder)? {
        let path = entry.map_err(io).in_file(folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            std::fs::remove_file(&path).map_err(io).in_file(&path)?;
        }
    }
    Ok(())
}

/// What a run works on.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Checkpoint,
    pub(crate) stats: &'a StatsFile,
    /// The text, when the statistics come from it.
    pub(crate) tokens: Option<&'a Tokens>,
    pub(crate) shapes: &'a [LayerShape],
    pub(crate) ids: &'a [LayerId],
    pub(crate) output: &'a Output,
    pub(crate) observer: &'a dyn Observer,
}

fn summary(source: &Checkpoint, plan: &WritePlan, written: Written) -> WrittenReport {
    let expert_bytes = source.layers().iter().map(|l| l.expert_bytes).sum();
    WrittenReport {
        export: match plan.export {
            Export::Stock => "stock",
            Export::Native => "native",
            Export::Expanded => "expanded",
        }
        .into(),
        tensor_bytes: Change { before: source.total_bytes(), after: written.bytes },
        expert_bytes: Change { before: expert_bytes, after: written.expert_bytes },
        parameters: Change { before: source.total_parameters(), after: written.parameters },
        dropped: written.dropped,
    }
}

pub(crate) struct Folder<'a> {
    pub(crate) source: &'a Checkpoint,
    pub(crate) stats: &'a StatsFile,
}

impl Source for Folder<'_> {
    fn router(&self, id: LayerId) -> Result<Router> {
        self.source.read_router(id)
    }

    fn layer(&self, id: LayerId) -> Result<MoeLayer> {
        self.source.read_layer(id)
    }

    fn expert(&self, id: LayerId, i: usize) -> Result<Expert> {
        self.source.read_expert(id, i)
    }

    fn stats(&self, id: LayerId, needs: Needs) -> Result<RoutingStats> {
        self.stats.layer(&id, needs)
    }

    fn release(&self, id: LayerId) {
        self.source.release(id);
    }
}
