//! A checkpoint, from one folder to another: which route a run takes, and what all routes share.

pub(super) mod along_text;
pub(super) mod checks;
pub(super) mod decisions;
pub(super) mod distributed;
pub(super) mod in_memory;
pub(super) mod one_pass;
pub(super) mod output;
pub(super) mod request;
pub(super) mod resume;
pub(super) mod size_budget;
pub(super) mod two_pass;
pub(super) mod write;

use std::collections::BTreeMap;
use std::path::Path;

use self::checks::{Checked, check_run};
use self::one_pass::{KnownCounts, OnePass};
use self::output::{Output, provenance_of, run_report, written_report};
pub use self::request::Run;
use self::resume::fingerprint::Fingerprint;
use self::resume::journal::{Journal, Line};
use self::resume::remove_hidden;
use self::two_pass::{SecondPass, TwoPass, collect_statistics, sample_origin};
use crate::calibrate::StatsFile;
use crate::calibrate::text::TextRecord;
use crate::checkpoint::{Checkpoint, Partial, WritePlan, Writer};
use crate::error::{ErrorKind, Result};
use crate::model::LayerId;
use crate::pipeline::activations::calibration::{Calibration, CalibrationData};
use crate::pipeline::activations::tokens::CalibrateOptions;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::stages::SampleOrigin;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::Observer;
use crate::pipeline::provenance::CalibrationReport;
use crate::pipeline::recipe::Recipe;
use crate::pipeline::report::{LayerReport, Report};
use crate::stage::Needs;

/// Merges the experts of the checkpoint in the folder `model` as `recipe` says and writes a new
/// folder `target`. `calibration` is text, token ids or a statistics file; a path
/// is told by what lies there ([`Calibration::Path`]).
///
/// One layer is in memory at a time. The target appears whole or not at all: everything is written
/// beside it, in `<target>.partial`, and renamed at the end. A run that failed or was killed once
/// something was computed leaves that folder, and the same call goes on from the last layer that
/// was written, or one shortly before it; the target has the bytes of an undisturbed run. With
/// another source, calibration or recipe it is refused. A run that shall leave nothing behind is a
/// [`Run`] without [`resume`](Run::resume).
///
/// # Errors
/// Before any weight is read: an unreadable or unsupported checkpoint, statistics of another model
/// or without what a stage needs, a budget that cannot be met, a target that is in the way. Later:
/// non-finite weights, a full disk. Each names file, tensor, layer and expert where they are known.
///
/// # Example
/// ```no_run
/// use mcsmoe::pipeline::{Calibration, Keep, Recipe, merge_then_compress};
///
/// // Half of the experts, calibrated on windows of 512 tokens, 65,536 in all, drawn by a seed.
/// let recipe = Recipe::preset("fast", Keep::Fraction(0.5))?;
/// let text = Calibration::text("texts", 512, 65_536, 0);
/// let report = merge_then_compress("mixtral", text, "mixtral-half", &recipe)?;
/// println!("{:.0}% of the expert parameters saved", 100.0 * report.expert_parameters.saved());
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn merge_then_compress(
    model: impl AsRef<Path>,
    calibration: impl Into<Calibration>,
    target: impl AsRef<Path>,
    recipe: &Recipe,
) -> Result<Report> {
    let source = Checkpoint::open(model.as_ref())?;
    let pipeline = recipe.builder()?.build()?;
    let run = pipeline.run().calibration(calibration).resume(true);
    run.export(recipe.export).shard_bytes(recipe.shard_bytes).write(&source, target)
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
/// Two more are chosen by the caller: [in memory](self::in_memory::InMemory), and a part of a
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
    /// What the statistics come from.
    pub(crate) provenance: Option<CalibrationReport>,
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
        let provenance = match calibration {
            CalibrationData::Statistics(stats) => Some(provenance_of(stats)?),
            CalibrationData::Tokens(_) => None,
        };
        Ok(Self { pipeline, source, target, output, observer, shapes, ids, provenance })
    }

    /// The same with the record of the text that the tokens come from.
    pub(crate) fn on_text(mut self, record: Option<&TextRecord>) -> Self {
        if let Some(record) = record {
            self.provenance =
                Some(CalibrationReport { statistics: None, text: Some(record.clone()) });
        }
        self
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
        let mut report = run_report(self.pipeline, reports.into_values().collect());
        report.family = Some(self.source.family().into());
        report.tokens = tokens;
        report.calibration.clone_from(&self.provenance);
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
