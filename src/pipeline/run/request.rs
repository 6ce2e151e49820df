//! The front door: what a run is asked for, and where its result goes.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::calibrate::StatsFile;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{MoeLayer, RoutingStats};
use crate::pipeline::activations::calibration::{Calibration, CalibrationData};
use crate::pipeline::activations::model::EvalModel;
use crate::pipeline::activations::tokens::{TextTokens, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::progress::{Observer, Silent};
use crate::pipeline::recipe::ExportChoice;
use crate::pipeline::report::Report;
use crate::pipeline::run::CheckpointRun;
use crate::pipeline::run::distributed::{Distributed, PartReport};
use crate::pipeline::run::in_memory::{InMemory, Merged};
use crate::pipeline::run::output::Output;

/// A run of a pipeline: settings first, then one of [`write`](Self::write),
/// [`write_part`](Self::write_part), [`assemble`](Self::assemble) and
/// [`in_memory`](Self::in_memory).
///
/// # Example
/// ```no_run
/// use mcsmoe::checkpoint::Checkpoint;
/// use mcsmoe::pipeline::{Calibration, Keep, Recipe};
///
/// let pipeline = Recipe::preset("fast", Keep::Fraction(0.5))?.builder()?.build()?;
/// let source = Checkpoint::open("mixtral")?;
/// let text = Calibration::text("texts", 512, 65_536, 0);
/// let report = pipeline.run().calibration(text).resume(true).write(&source, "mixtral-half")?;
/// println!("{} of {} experts are left", report.experts.after, report.experts.before);
/// # Ok::<(), mcsmoe::Error>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct Run<'a> {
    pipeline: &'a Pipeline,
    calibration: Option<Calibration>,
    output: Output,
    observer: &'a dyn Observer,
}

impl Pipeline {
    /// A run without calibration, which writes a stock folder and tells nobody of its progress.
    pub fn run(&self) -> Run<'_> {
        Run { pipeline: self, calibration: None, output: Output::default(), observer: &Silent }
    }
}

impl<'a> Run<'a> {
    /// Where the statistics come from; needed by every run on a checkpoint.
    pub fn calibration(self, calibration: impl Into<Calibration>) -> Self {
        Self { calibration: Some(calibration.into()), ..self }
    }

    /// Who is told of the progress.
    pub fn observer(self, observer: &'a dyn Observer) -> Self {
        Self { observer, ..self }
    }

    /// The kind of folder; [`ExportChoice::Stock`] unless given.
    pub fn export(mut self, export: ExportChoice) -> Self {
        self.output.export = export;
        self
    }

    /// Whether to go on from an interrupted run; see [`Output::resume`]. `false` unless given.
    pub fn resume(mut self, resume: bool) -> Self {
        self.output.resume = resume;
        self
    }

    /// Bytes of hidden states that are held in memory; see [`Output::memory`].
    pub fn memory(mut self, bytes: u64) -> Self {
        self.output.memory = bytes;
        self
    }

    /// Largest size of a file, in bytes; 5 GB unless given.
    pub fn shard_bytes(mut self, bytes: u64) -> Self {
        self.output.shard_bytes = bytes;
        self
    }

    /// All settings of the target at once.
    pub fn output(self, output: Output) -> Self {
        Self { output, ..self }
    }

    /// Merges a checkpoint into a new folder `target`, one layer in memory at a time. The target
    /// appears whole or not at all: everything is written beside it, in `<target>.partial`, and
    /// renamed at the end.
    ///
    /// Where the grouper tells how many experts each layer keeps
    /// ([`Grouper::counts`](crate::stage::Grouper::counts)), text and layers go through the model
    /// together and every layer is read once. Else text runs through the model before anything is
    /// merged; its statistics lie in the partial folder until the run is over. The bytes are the
    /// same either way.
    ///
    /// # Errors
    /// As [`merge_then_compress`](super::merge_then_compress); [`ErrorKind::Recipe`] without a
    /// calibration, when the export needs a narrowed router and the pipeline has none, or the other
    /// way round; [`ErrorKind::Target`] when a run cannot be resumed.
    pub fn write(self, source: &Checkpoint, target: impl AsRef<Path>) -> Result<Report> {
        let target = target.as_ref();
        let run = |data, record| {
            let (pipeline, folders) = (self.pipeline, (source, target));
            let run = CheckpointRun::new(pipeline, folders, data, &self.output, self.observer)?;
            run.on_text(record).run(data)
        };
        match &*self.calibration.as_ref().ok_or_else(missing)?.resolved()? {
            Calibration::Path(path) => Err(unresolved(path)),
            Calibration::Statistics(path) => {
                run(CalibrationData::Statistics(&StatsFile::open(path)?), None)
            }
            Calibration::Tokens(tokens) => run(CalibrationData::Tokens(tokens), None),
            Calibration::Read(TextTokens { tokens, record }) => {
                run(CalibrationData::Tokens(tokens), Some(record))
            }
            Calibration::Text { path, options } => {
                let subject = EvalModel::open(source, &self.pipeline.cx)?;
                let TextTokens { tokens, record } = Tokens::recorded(&subject, path, options)?;
                run(CalibrationData::Tokens(&tokens), Some(&record))
            }
        }
    }

    /// Merges the layers `layers`, positions in [`Checkpoint::layers`], and writes them into
    /// `folder`, for [`assemble`](Self::assemble). The calibration is a statistics file: with it,
    /// layers are independent, and several machines can share a run.
    ///
    /// With [`resume`](Self::resume) what an interrupted process left is written over, and a folder
    /// that is there already is taken if it belongs to this run: a job queued again does no harm.
    /// Layers that are protected are in no part; they are copied when the parts are joined.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`ErrorKind::OutOfRange`] for positions beyond the last.
    ///
    /// # Cost
    /// The first pass over all layers (similarity, alignment before grouping) in every process, the
    /// second over its own.
    pub fn write_part(
        self,
        source: &Checkpoint,
        layers: Range<usize>,
        folder: impl AsRef<Path>,
    ) -> Result<PartReport> {
        let (stats, folders) = (self.statistics()?, (source, folder.as_ref()));
        Distributed::new(self.pipeline, folders, &stats, &self.output, self.observer)?.run(layers)
    }

    /// Joins the folders that [`write_part`](Self::write_part) has written into `target`, which has
    /// the bytes of a run in one process. Everything else is copied from the source.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`ErrorKind::Target`] when a part belongs to another run or a
    /// layer lies in none or in two; [`ErrorKind::Format`] when a part is not what its manifest
    /// says.
    ///
    /// # Cost
    /// Reads and writes every byte once; nothing is computed but hashes.
    pub fn assemble(
        self,
        source: &Checkpoint,
        parts: &[PathBuf],
        target: impl AsRef<Path>,
    ) -> Result<Report> {
        let (stats, folders) = (self.statistics()?, (source, target.as_ref()));
        let run = Distributed::new(self.pipeline, folders, &stats, &self.output, self.observer)?;
        run.assemble(parts)
    }

    /// Merges layers that are in memory: `stats[i]` belongs to `layers[i]`. Needs no calibration.
    ///
    /// # Errors
    /// [`ErrorKind::Statistics`] when they do not fit, [`ErrorKind::Budget`] when the budget cannot
    /// be met; else those of the stages, with layer and expert.
    ///
    /// # Memory
    /// One more copy of the largest layer, and the merged layers.
    pub fn in_memory(self, layers: &[MoeLayer], stats: &[RoutingStats]) -> Result<Merged> {
        InMemory::new(self.pipeline, layers, stats, self.observer).run()
    }

    fn statistics(&self) -> Result<StatsFile> {
        match &*self.calibration.as_ref().ok_or_else(missing)?.resolved()? {
            Calibration::Statistics(path) => StatsFile::open(path),
            _ => {
                let reason = "layers depend on each other unless statistics are given: collect \
                              them with `calibrate` first";
                Err(ErrorKind::Recipe { reason: reason.into() }.into())
            }
        }
    }
}

fn unresolved(path: &Path) -> Error {
    Error::bug(format!("the kind of {} was not looked at", path.display()))
}

fn missing() -> Error {
    let reason = "a run on a checkpoint needs a calibration: text, token ids or a statistics file";
    ErrorKind::Recipe { reason: reason.into() }.into()
}
