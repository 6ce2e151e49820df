//! What merge, compress and run have in common: inputs in, a written target out.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{Calibration, Recipe, Report};
use serde::Serialize;

use crate::args::{Global, Running, TextArgs};
use crate::exit::Outcome;
use crate::progress::{Progress, peak_memory};
use crate::report;
use crate::show::{Show, bytes, time};

/// From where to where.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Places {
    /// The folder of a checkpoint.
    pub(crate) model: PathBuf,
    /// Text (.txt, .jsonl, token ids, or a folder of these), or a statistics file.
    pub(crate) calibration: PathBuf,
    /// The folder to write; it appears when it is whole.
    pub(crate) target: PathBuf,
}

/// A run that has ended.
#[derive(Debug, Serialize)]
pub(crate) struct Finished {
    pub(crate) target: PathBuf,
    pub(crate) seconds: f64,
    /// In bytes.
    pub(crate) peak_memory: Option<u64>,
    pub(crate) report: Report,
}

/// Text or statistics, as the path says.
pub(crate) fn calibration(
    source: &Checkpoint,
    path: &Path,
    text: &TextArgs,
) -> Outcome<Calibration> {
    let TextArgs { tokens, window, text_seed } = *text;
    Ok(Calibration::read(source, path, window, tokens, text_seed)?)
}

/// Writes the target.
pub(crate) fn execute(
    places: &Places,
    recipe: &Recipe,
    (text, running): (&TextArgs, &Running),
    global: &Global,
) -> Outcome<Finished> {
    let start = Instant::now();
    let source = Checkpoint::open(&places.model)?;
    let pipeline = recipe.builder()?.compute(global.compute()?).build()?;
    let given = calibration(&source, &places.calibration, text)?;
    let output = running.output(recipe);
    let progress = Progress::new(global, &source);
    let report = pipeline.run_calibrated(&source, &given, &places.target, &output, &progress);
    progress.done();
    Ok(Finished {
        target: places.target.clone(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: peak_memory(),
        report: report?,
    })
}

/// Plans, or writes the target and tells what was done.
pub(crate) fn carry_out(
    places: &Places,
    recipe: &Recipe,
    (text, running): (&TextArgs, &Running),
    global: &Global,
    show: &Show,
) -> Outcome {
    let done = execute(places, recipe, (text, running), global)?;
    show.result(&done, |out| tell(&done, out))
}

/// The end of a run for people.
pub(crate) fn tell(done: &Finished, out: &mut dyn std::io::Write) -> std::io::Result<()> {
    report::text(&done.report, out)?;
    write!(out, "{}: {}", done.target.display(), time(done.seconds))?;
    match done.peak_memory {
        Some(peak) => writeln!(out, ", peak memory {}", bytes(peak)),
        None => writeln!(out),
    }
}
