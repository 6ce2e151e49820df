//! From one folder to another.

pub(super) mod along_text;
pub(super) mod distributed;
pub(super) mod in_memory;
pub(super) mod one_pass;
pub(super) mod resume;
pub(super) mod two_pass;

use std::path::Path;

use crate::calibrate::{Collector, StatsFile};
use crate::checkpoint::{Checkpoint, LayerInfo, Partial};
use crate::error::{ErrorKind, Locate, Result};
use crate::model::{LayerId, Target};
use crate::pipeline::activations::calibration::{Calibration, Given};
use crate::pipeline::activations::tokens::Tokens;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::evaluate::model::Subject;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::{Observer, Silent};
use crate::pipeline::recipe::{ExportChoice, Recipe};
use crate::pipeline::report::Report;
use crate::pipeline::run::one_pass::Once;
use crate::pipeline::run::resume::fingerprint::Fingerprint;
use crate::pipeline::run::resume::journal::Journal;
use crate::pipeline::run::two_pass::Job;
use crate::stage::{ExpertStorage, Needs};

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

/// What [`Pipeline::run_checkpoint`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The kind of folder.
    pub export: ExportChoice,
    /// Largest size of a file, in bytes.
    pub shard_bytes: u64,
    /// Bytes of hidden states of text that are held in memory; above, they go to a scratch file in
    /// the partial folder.
    pub memory: u64,
    /// Goes on from the last layer that an interrupted run has written, if there was one, and
    /// leaves the partial folder after a failure, if statistics or a layer lie in it. The target
    /// has the bytes of an undisturbed run. Refused when source, statistics or text, recipe or
    /// export are not those of that run. A run that follows a text layer by layer keeps the hidden
    /// states behind its last three layers in the partial folder for that: `12 t d_model` bytes,
    /// as much again for what a recoverer follows, and twice that in an encoder-decoder model.
    pub resume: bool,
}

impl Output {
    /// A folder of one kind, in files of at most 5 GB; a partial folder is in the way.
    pub fn new(export: ExportChoice) -> Self {
        Self { export, shard_bytes: 5_000_000_000, memory: 2 << 30, resume: false }
    }

    /// The same, but going on from an interrupted run.
    #[must_use]
    pub fn resuming(self) -> Self {
        Self { resume: true, ..self }
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
        self.run_given(source, Given::Statistics(stats), target, output, observer)
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
                self.run_given(source, Given::Tokens(tokens), target, output, observer)
            }
            Calibration::Text { path, options } => {
                let subject = Subject::open(source, &self.cx)?;
                let tokens = Tokens::cut(&subject, path, options)?;
                self.run_given(source, Given::Tokens(&tokens), target, output, observer)
            }
        }
    }

    fn run_given(
        &self,
        source: &Checkpoint,
        given: Given<'_>,
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        let (shapes, ids) = self.check_run(source, given, output)?;
        let print = Fingerprint::of(self, source, given, output)?;
        if output.resume
            && let Some(report) = Journal::whole(target, &print)?
        {
            return Ok(report);
        }
        let begin = if output.resume { Partial::resume } else { Partial::create };
        let partial = begin(source.dir(), target)?;
        let journal = Journal::open(partial.path(), &print)?;
        let folder = partial.path().to_owned();
        let (shapes, ids) = (&shapes[..], &ids[..]);
        let shown = (output, observer);
        let done = self.begun(source, given, (shapes, ids), shown, (partial, journal), target);
        if done.is_err() && output.resume {
            Journal::discard_if_bare(&folder);
        }
        done
    }

    /// A run whose partial folder is there.
    fn begun(
        &self,
        source: &Checkpoint,
        given: Given<'_>,
        (shapes, ids): (&[LayerShape], &[LayerId]),
        (output, observer): (&Output, &dyn Observer),
        (partial, mut journal): (Partial, Journal),
        target: &Path,
    ) -> Result<Report> {
        let collected;
        let (stats, tokens) = match given {
            Given::Statistics(stats) => (stats, None),
            Given::Tokens(tokens) => {
                if let Some(counted) = self.counted(shapes)? {
                    let once = Once { source, tokens, output, observer };
                    return self.run_once(&once, &counted, (partial, journal), target);
                }
                let scratch = (partial.path(), output.memory);
                collected = self.collect(source, tokens, &mut journal, scratch, observer)?;
                (&collected, Some(tokens))
            }
        };
        let job = Job { source, stats, tokens, shapes, ids, output, observer };
        self.run_job(&job, partial, journal, target)
    }

    /// Everything that can be refused before a weight is read; shapes of all layers, and the layers
    /// that take part.
    pub(crate) fn check_run(
        &self,
        source: &Checkpoint,
        given: Given<'_>,
        output: &Output,
    ) -> Result<(Vec<LayerShape>, Vec<LayerId>)> {
        let Checked { shapes, active, .. } = self.check_source(source, output.export)?;
        let ids: Vec<LayerId> = active.iter().map(|s| s.id).collect();
        match given {
            Given::Statistics(stats) => self.check_stats(source, stats, &ids)?,
            Given::Tokens(_) => drop(Collector::new(self.needs())?),
        }
        Ok((shapes, ids))
    }

    /// What of it does not depend on the statistics.
    pub(crate) fn check_source(
        &self,
        source: &Checkpoint,
        export: ExportChoice,
    ) -> Result<Checked> {
        self.check_export(export)?;
        self.check_layout(source, export)?;
        let shapes: Vec<LayerShape> = source.layers().iter().map(shape).collect();
        let (active, target) = self.checked(&shapes)?;
        let matrices = |l: &LayerInfo| (l.id, (l.d_ff, l.d_model));
        self.check_compression(source.layers().iter().map(matrices))?;
        if export == ExportChoice::Native {
            self.check_native(source)?;
        }
        Ok(Checked { shapes, active, target })
    }

    /// Refuses parts that no native folder can hold.
    fn check_native(&self, source: &Checkpoint) -> Result<()> {
        let Some(compressor) = &self.compressor else { return Ok(()) };
        for layer in source.layers() {
            if compressor.storage((layer.d_ff, layer.d_model))? == ExpertStorage::Shared {
                let reason = format!(
                    "native folders hold no base that experts share, as compressor `{}` makes: \
                     export stock or expanded",
                    compressor.name()
                );
                return Err(ErrorKind::Recipe { reason }.into());
            }
        }
        Ok(())
    }

    fn check_export(&self, export: ExportChoice) -> Result<()> {
        if self.size_budget().is_some() && export != ExportChoice::Native {
            let reason = "a size budget is met by the factors of a native export; the others hold \
                          matrices multiplied out";
            return Err(ErrorKind::Recipe { reason: reason.into() }.into());
        }
        let reason = match (export, self.router.is_some()) {
            (ExportChoice::Stock, false) => "a stock export needs a router stage",
            (ExportChoice::Native | ExportChoice::Expanded, true) => {
                "native and expanded exports keep the router: leave the router stage out"
            }
            _ => return Ok(()),
        };
        Err(ErrorKind::Recipe { reason: reason.into() }.into())
    }

    /// Factors in a native folder need tensors of their own.
    fn check_layout(&self, source: &Checkpoint, export: ExportChoice) -> Result<()> {
        let compresses = self.compressor.is_some() && export == ExportChoice::Native;
        if !compresses || source.can_hold_factors() {
            return Ok(());
        }
        let kind = ErrorKind::Unsupported {
            what: "layout for factors in a native folder",
            found: source.layout().into(),
            supported: "layouts with a tensor for every projection; of this one, stock and \
                        expanded exports, which hold the factors multiplied out"
                .into(),
        };
        Err(kind.into())
    }

    /// Every stage's needs against what the file holds, before any weight is read.
    fn check_stats(&self, source: &Checkpoint, stats: &StatsFile, ids: &[LayerId]) -> Result<()> {
        for id in ids {
            if !stats.layers().contains(id) {
                let known: Vec<String> = stats.layers().iter().map(ToString::to_string).collect();
                let reason = format!("no statistics of {id}; the file has {}", known.join(", "));
                return Err(ErrorKind::Statistics { reason }.into());
            }
            let expected = source.layer(*id)?.experts;
            let found = stats.experts(id).unwrap_or(expected);
            if found != expected {
                let reason = format!("{found} experts where the model has {expected}");
                return Err(ErrorKind::Statistics { reason }.into()).in_layer(id);
            }
            let given = stats.available(id) | Needs::EXPERTS;
            let missing: Vec<_> = self.needs().without(given).names().collect();
            if !missing.is_empty() {
                let remedy = "collect them, or choose stages that need less".into();
                let kind = ErrorKind::Missing {
                    stage: "the recipe".into(),
                    needs: missing.join(", "),
                    remedy,
                };
                return Err(kind.into()).in_layer(id);
            }
        }
        Ok(())
    }
}

/// A source that a pipeline can work on.
pub(crate) struct Checked {
    /// Of all MoE layers.
    pub(crate) shapes: Vec<LayerShape>,
    /// Of those that take part.
    pub(crate) active: Vec<LayerShape>,
    /// What the budget asks of them.
    pub(crate) target: Target,
}

fn shape(info: &LayerInfo) -> LayerShape {
    LayerShape { id: info.id, experts: info.experts, rule: info.rule }
}
