//! A checkpoint, from one folder to another: which route a run takes, and what all routes share.

pub(super) mod along_text;
pub(super) mod checks;
pub(super) mod decisions;
pub(super) mod distributed;
pub(super) mod in_memory;
pub(super) mod one_pass;
pub(super) mod output;
pub(super) mod resume;
pub(super) mod two_pass;
pub(super) mod write;

use std::collections::BTreeMap;
use std::path::Path;

use self::checks::{Checked, check_run};
use self::in_memory::{InMemory, Merged};
use self::one_pass::{KnownCounts, OnePass};
use self::output::{Output, written_report};
use self::resume::fingerprint::Fingerprint;
use self::resume::journal::{Journal, Line};
use self::resume::remove_hidden;
use self::two_pass::{SecondPass, TwoPass, collect_statistics, sample_origin};
use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, Partial, WritePlan, Writer};
use crate::error::{ErrorKind, Result};
use crate::model::{LayerId, MoeLayer, RoutingStats};
use crate::pipeline::activations::calibration::{Calibration, CalibrationData};
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::evaluate::model::Subject;
use crate::pipeline::layer::stages::SampleOrigin;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{Observer, Silent};
use crate::pipeline::recipe::Recipe;
use crate::pipeline::report::{LayerReport, Report};
use crate::stage::Needs;

/// Merges the experts of the checkpoint in `source` as `recipe` says and writes a new folder
/// `target`. `calibration` is a routing statistics file, or text or token ids that are run through
/// the model first.
///
/// One layer is in memory at a time. The target appears whole or not at all: everything is written
/// beside it, in `<target>.partial`, and renamed at the end. A run that failed or was killed once
/// something was computed leaves that folder, and the same call goes on from the last layer that
/// was written, or one shortly before it; the target has the bytes of an undisturbed run. With
/// another source, calibration or recipe it is refused. A run that shall leave nothing behind is
/// [`Pipeline::run_calibrated`] without [`Output::resume`].
///
/// # Errors
/// Before any weight is read: an unreadable or unsupported checkpoint, statistics of another model
/// or without what a stage needs, a budget that cannot be met, a target that is in the way. Later:
/// non-finite weights, a full disk. Each names file, tensor, layer and expert where they are known.
///
/// # Example
/// ```no_run
/// use std::path::Path;
/// use mcsmoe::pipeline::{Calibration, Keep, Recipe, merge_then_compress};
///
/// let recipe = Recipe::preset("m-smoe", Keep::Experts(4))?;
/// let (source, stats) = (Path::new("mixtral"), Path::new("mixtral.stats.safetensors"));
/// let report = merge_then_compress(source, stats, &recipe, Path::new("mixtral-4e"))?;
/// println!("{:.0}% of the expert parameters saved", 100.0 * report.expert_parameters.saved());
///
/// // The same from text: windows of 512 tokens, 100,000 tokens in all, drawn by a seed of 7.
/// let text = Calibration::text("texts", 512, 100_000, 7);
/// merge_then_compress(source, text, &recipe, Path::new("mixtral-4e-too"))?;
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn merge_then_compress(
    source: &Path,
    calibration: impl Into<Calibration>,
    recipe: &Recipe,
    target: &Path,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(source)?;
    let output = Output::new(recipe.export).resuming();
    let output = Output { shard_bytes: recipe.shard_bytes, ..output };
    let pipeline = recipe.builder()?.build()?;
    pipeline.run_calibrated(&checkpoint, &calibration.into(), target, &output, &Silent)
}

/// The way of a run on a checkpoint. All ways take each layer through
/// [`process_layer`](super::layer::process::process_layer), and write the same bytes.
pub(crate) enum Route {
    /// Text and layers go together: a layer is observed, decided, merged and written before the
    /// next is read. For groupers that say beforehand how many experts each layer keeps.
    OnePass(KnownCounts),
    /// All layers are observed and decided first, then processed. With text, its statistics are
    /// collected into a file before.
    TwoPass(SecondPass),
}

/// Chooses the route.
///
/// Two more are chosen by the caller: [`InMemory`], and a part of a
/// [distributed](self::distributed::Distributed) run, which is the second pass of some layers.
pub(crate) fn route(run: &CheckpointRun<'_>, calibration: CalibrationData<'_>) -> Result<Route> {
    Ok(match calibration {
        CalibrationData::Statistics(stats) => {
            Route::TwoPass(SecondPass::of(run, run.sample_origin(stats)))
        }
        CalibrationData::Tokens(_) => match KnownCounts::of(run.pipeline, &run.shapes)? {
            Some(counts) => Route::OnePass(counts),
            None if run.pipeline.recoverer.is_some() => Route::TwoPass(SecondPass::AlongText),
            None => {
                let collected = run.pipeline.needs_along_text().contains(Needs::SAMPLES);
                let origin =
                    if collected { SampleOrigin::Statistics } else { SampleOrigin::Nowhere };
                Route::TwoPass(SecondPass::of(run, origin))
            }
        },
    })
}

/// A run on a checkpoint that has been checked: what every route works with.
pub(crate) struct CheckpointRun<'a> {
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) source: &'a Checkpoint,
    pub(crate) target: &'a Path,
    pub(crate) output: &'a Output,
    pub(crate) observer: &'a dyn Observer,
    /// Of all MoE layers.
    pub(crate) shapes: Vec<LayerShape>,
    /// The layers that take part.
    pub(crate) ids: Vec<LayerId>,
}

/// The partial folder of a run, and the journal in it.
pub(crate) struct PartialRun {
    pub(crate) partial: Partial,
    pub(crate) journal: Journal,
}

impl<'a> CheckpointRun<'a> {
    /// Checks everything that can be refused before a weight is read.
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        (source, target): (&'a Checkpoint, &'a Path),
        calibration: CalibrationData<'_>,
        output: &'a Output,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let checked = check_run(pipeline, source, calibration, output.export)?;
        let ids = checked.ids();
        let Checked { shapes, .. } = checked;
        Ok(Self { pipeline, source, target, output, observer, shapes, ids })
    }

    /// Runs from the start, or from what an interrupted run has left.
    pub(crate) fn run(&self, calibration: CalibrationData<'_>) -> Result<Report> {
        let print = Fingerprint::of(self.pipeline, self.source, calibration, self.output)?;
        if self.output.resume
            && let Some(report) = Journal::whole(self.target, &print)?
        {
            return Ok(report);
        }
        let partial = self.begin(self.target)?;
        let journal = Journal::open(partial.path(), &print)?;
        let folder = partial.path().to_owned();
        let done = self.follow(calibration, PartialRun { partial, journal });
        if done.is_err() && self.output.resume {
            Journal::discard_if_empty(&folder);
        }
        done
    }

    /// Takes the route, in a partial folder that is there.
    fn follow(&self, calibration: CalibrationData<'_>, mut partial: PartialRun) -> Result<Report> {
        match (route(self, calibration)?, calibration) {
            (Route::OnePass(counts), CalibrationData::Tokens(tokens)) => {
                OnePass::new(self, tokens, counts).run(partial)
            }
            (Route::TwoPass(second), CalibrationData::Tokens(tokens)) => {
                let stats = collect_statistics(self, tokens, &mut partial)?;
                TwoPass::new(self, &stats, Some(tokens), second).run(partial)
            }
            (Route::TwoPass(second), CalibrationData::Statistics(stats)) => {
                TwoPass::new(self, stats, None, second).run(partial)
            }
            (Route::OnePass(_), CalibrationData::Statistics(_)) => {
                let reason = "a run in one pass needs text, not statistics".into();
                Err(ErrorKind::Recipe { reason }.into())
            }
        }
    }

    /// The partial folder of `target`.
    pub(crate) fn begin(&self, target: &Path) -> Result<Partial> {
        let begin = if self.output.resume { Partial::resume } else { Partial::create };
        begin(self.source.dir(), target)
    }

    /// How text runs through the model of a run whose partial folder is `folder`.
    pub(crate) fn text_options(&self, folder: &Path, memory: u64) -> CalibrateOptions {
        CalibrateOptions {
            memory,
            scratch: folder.into(),
            cx: self.pipeline.cx.clone(),
            ..CalibrateOptions::default()
        }
    }

    /// Where samples of the layers come from in a run on statistics.
    pub(crate) fn sample_origin(&self, stats: &StatsFile) -> SampleOrigin {
        sample_origin(stats, &self.ids)
    }

    /// Reports, seals, and gives the target its name.
    pub(crate) fn finish(
        &self,
        plan: &WritePlan,
        reports: BTreeMap<LayerId, LayerReport>,
        (mut writer, mut journal): (Writer<'_>, Journal),
        tokens: u64,
    ) -> Result<Report> {
        let mut report = Report::of(self.pipeline, reports.into_values().collect());
        report.family = Some(self.source.family().into());
        report.tokens = tokens;
        report.written = Some(written_report(self.source, plan, writer.written()));
        writer.seal(&report.to_value()?)?;
        remove_hidden(writer.folder())?;
        journal.write(&Line::Whole(Box::new(report.clone())))?;
        drop(journal);
        writer.commit()?;
        Journal::remove(self.target)?;
        self.observer.finished(&report);
        Ok(report)
    }
}

impl Pipeline {
    /// Merges a checkpoint, one layer in memory at a time; see [`merge_then_compress`].
    ///
    /// # Errors
    /// As [`merge_then_compress`]; [`ErrorKind::Recipe`] when the export needs a narrowed router
    /// and the pipeline has none, or the other way round; [`ErrorKind::Target`] when a run cannot
    /// be resumed.
    pub fn run_checkpoint(
        &self,
        source: &Checkpoint,
        stats: &StatsFile,
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        self.run_given(source, CalibrationData::Statistics(stats), target, output, observer)
    }

    /// [`Pipeline::run_checkpoint`] with any source of statistics. Where the grouper tells how many
    /// experts each layer keeps ([`Grouper::counts`](crate::stage::Grouper::counts)), text and
    /// merge go through the model together and every layer is read once. Else text runs through
    /// the model before anything is merged; its statistics lie in the partial folder until the run
    /// is over, so that a resumed run need not repeat that. The bytes are the same either way.
    ///
    /// # Errors
    /// As [`Pipeline::run_checkpoint`]; with text also those of
    /// [`calibrate`](crate::pipeline::calibrate()).
    pub fn run_calibrated(
        &self,
        source: &Checkpoint,
        calibration: &Calibration,
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        match calibration {
            Calibration::Statistics(path) => {
                self.run_checkpoint(source, &StatsFile::open(path)?, target, output, observer)
            }
            Calibration::Tokens(tokens) => {
                self.run_given(source, CalibrationData::Tokens(tokens), target, output, observer)
            }
            Calibration::Text { path, options } => {
                let subject = Subject::open(source, &self.cx)?;
                let tokens = Tokens::cut(&subject, path, options)?;
                self.run_given(source, CalibrationData::Tokens(&tokens), target, output, observer)
            }
        }
    }

    fn run_given(
        &self,
        source: &Checkpoint,
        calibration: CalibrationData<'_>,
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        let folders = (source, target);
        CheckpointRun::new(self, folders, calibration, output, observer)?.run(calibration)
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
        InMemory::new(self, layers, stats, observer).run()
    }
}
