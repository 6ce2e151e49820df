//! What merge, compress and run have in common: inputs in, a written target out.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::calibrate::InputKind;
use mcsmoe::checkpoint::{Checkpoint, Partial};
use mcsmoe::pipeline::{
    Calibration, Output, OwnTextOptions, PlanOptions, Recipe, Report, RunPlan, TextTokens, Tokens,
    plan,
};
use mcsmoe::stage::Context;
use serde::Serialize;

use crate::args::{Global, Method, Running, TextArgs};
use crate::artifacts;
use crate::examine::report;
use crate::exit::{Failure, Outcome};
use crate::locate::model_folder;
use crate::progress::{Progress, peak_memory, warn};
use crate::show::{Show, bytes, time};

/// From where to where.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Places {
    /// The folder of a checkpoint, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    pub(crate) model: PathBuf,
    /// Text (.txt, .jsonl, .json, also .gz and .zst), token ids, a folder, or a statistics file.
    pub(crate) calibration: PathBuf,
    /// The folder to write; it appears when it is whole.
    pub(crate) target: PathBuf,
}

/// What is to be done: the arguments of merge, compress and run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    pub(crate) places: Places,
    #[command(flatten)]
    pub(crate) method: Method,
    #[command(flatten)]
    pub(crate) text: TextArgs,
    #[command(flatten)]
    pub(crate) running: Running,
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

impl Finished {
    /// A run that began at `start` and ends now.
    pub(crate) fn now(target: &Path, start: Instant, report: Report) -> Self {
        let seconds = start.elapsed().as_secs_f64();
        Self { target: target.to_owned(), seconds, peak_memory: peak_memory(), report }
    }
}

/// Text or statistics, as the path says.
pub(crate) fn calibration(
    source: &Checkpoint,
    path: &Path,
    text: &TextArgs,
    global: &Global,
) -> Outcome<Calibration> {
    if InputKind::of(path)? == InputKind::Statistics {
        return Ok(Calibration::Statistics(path.into()));
    }
    Ok(read_text(source, path, text, global)?.into())
}

/// The tokens of a text, and those that the model writes itself where it is asked to.
pub(crate) fn read_text(
    source: &Checkpoint,
    path: &Path,
    text: &TextArgs,
    global: &Global,
) -> Outcome<TextTokens> {
    let read = Tokens::from_text(source, path, &text.options())?;
    warn(global, &read.record);
    if text.own_text == 0 {
        return Ok(read);
    }
    let (tokens, seed) = (text.own_text, text.text_seed);
    let options = OwnTextOptions { tokens, seed, ..OwnTextOptions::default() };
    Ok(read.with_own_text(source, &options, &Context::on(global.compute()?, seed))?)
}

/// Writes the target.
pub(crate) fn execute(task: &Task, recipe: &Recipe, global: &Global) -> Outcome<Finished> {
    let Task { places, text, .. } = task;
    let start = Instant::now();
    let source = Checkpoint::open(&places.model)?;
    let pipeline = recipe.builder()?.compute(global.compute()?).build()?;
    let given = calibration(&source, &places.calibration, text, global)?;
    let is_text = !matches!(given, Calibration::Statistics(_));
    let output = bounded(&source, recipe, task, is_text)?;
    let progress = Progress::new(global);
    let report = pipeline
        .run()
        .calibration(given.clone())
        .output(output)
        .observer(&progress)
        .write(&source, &places.target);
    progress.done();
    let report = report?;
    artifacts::card(places, &report, None)?;
    Ok(Finished::now(&places.target, start, report))
}

/// The plan of a run.
pub(crate) fn planned(
    source: &Checkpoint,
    recipe: &Recipe,
    (text, output): (&TextArgs, &Output),
    is_text: bool,
) -> Outcome<RunPlan> {
    let defaults = PlanOptions::default();
    let options = PlanOptions {
        tokens: text.tokens as u64,
        window: text.window.map_or(defaults.window, |n| n as u64),
        text: is_text,
        ..defaults
    };
    Ok(plan(source, recipe, output, &options)?)
}

/// What is written, within --max-memory: hidden states go to a scratch file if that is enough.
fn bounded(source: &Checkpoint, recipe: &Recipe, task: &Task, is_text: bool) -> Outcome<Output> {
    let mut output = task.running.output(recipe);
    let Some(allowed) = task.running.max_memory else { return Ok(output) };
    let mut needed = 0;
    for states in [output.memory, 0] {
        output.memory = states;
        needed = planned(source, recipe, (&task.text, &output), is_text)?.memory.peak;
        if needed <= allowed {
            return Ok(output);
        }
    }
    Err(Failure::Memory { needed, allowed })
}

/// Prints the plan; a target that is in the way is an error here too.
pub(crate) fn dry_run(task: &Task, recipe: &Recipe, global: &Global, show: &Show) -> Outcome {
    let Task { places, text, running, .. } = task;
    let source = Checkpoint::open(&places.model)?;
    global.compute()?;
    let is_text = InputKind::of(&places.calibration)? == InputKind::Text;
    let output = bounded(&source, recipe, task, is_text)?;
    if !running.resume {
        drop(Partial::create(source.dir(), &places.target)?);
    }
    let found = planned(&source, recipe, (text, &output), is_text)?;
    show.result(&found, |out| crate::produce::plan::text(&found, out))
}

/// Plans, or writes the target and tells what was done.
pub(crate) fn carry_out(task: &Task, recipe: &Recipe, global: &Global, show: &Show) -> Outcome {
    if task.running.dry_run {
        return dry_run(task, recipe, global, show);
    }
    let done = execute(task, recipe, global)?;
    show.result(&done, |out| print_summary(&done, out))
}

/// The end of a run for people.
pub(crate) fn print_summary(done: &Finished, out: &mut dyn std::io::Write) -> std::io::Result<()> {
    report::text(&done.report, out)?;
    write!(out, "{}: {}", done.target.display(), time(done.seconds))?;
    match done.peak_memory {
        Some(peak) => writeln!(out, ", peak memory {}", bytes(peak)),
        None => writeln!(out),
    }
}
