//! `run`: a recipe end to end.

use std::ops::Range;
use std::path::PathBuf;

use mcsmoe::Recipe;
use mcsmoe::calibrate::InputKind;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{Comparison, EvaluateOptions, Verification, compare, verify as check};
use mcsmoe::report::Quality;
use serde::Serialize;

use crate::args::{Global, range};
use crate::artifacts;
use crate::common::{self, Finished, Places, Task};
use crate::examine::evaluate::{divergence, sentence};
use crate::examine::verify;
use crate::exit::{Failure, Outcome};
use crate::progress::{Progress, during};
use crate::show::Show;

/// Carry out a recipe: calibrate, merge, recover, compress, write, verify, and evaluate if
/// asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Compare the target with the source on this text, which calibration should not have seen.
    #[arg(long, value_name = "TEXT")]
    evaluate: Option<PathBuf>,
    /// Write the report as a page with pictures, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Leave the verification out.
    #[arg(long)]
    no_verify: bool,
    /// Write these MoE layers only, positions in the list of `inspect`, for `assemble`; needs a
    /// statistics file.
    #[arg(long, value_name = "A..B", value_parser = range)]
    #[arg(conflicts_with_all = ["evaluate", "html", "part"])]
    layers: Option<Range<usize>>,
    /// The I-th of N equal shares of the layers, counted from 0: for arrays of jobs.
    #[arg(long, value_name = "I/N", value_parser = share)]
    #[arg(conflicts_with_all = ["evaluate", "html"])]
    part: Option<(usize, usize)>,
    #[command(flatten)]
    task: Task,
}

#[derive(Serialize)]
struct Done {
    #[serde(flatten)]
    finished: Finished,
    #[serde(skip_serializing_if = "Option::is_none")]
    verification: Option<Verification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<Comparison>,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let recipe = args.task.method.read(Recipe::DEFAULT_PRESET, None)?;
    let places = &args.task.places;
    if args.task.running.dry_run {
        return common::dry_run(&args.task, &recipe, global, show);
    }
    if args.layers.is_some() || args.part.is_some() {
        return part(args, &recipe, global, show);
    }
    let finished = common::execute(&args.task, &recipe, global)?;
    let mut verification = match args.no_verify {
        true => None,
        false => {
            let check = || check(&places.target, Some(&places.model));
            Some(during(global, "verify what was written", check)?)
        }
    };
    if let Some(found) = &mut verification {
        found.tensors.clear();
    }
    let options = EvaluateOptions::default();
    let comparison = match &args.evaluate {
        None => None,
        Some(text) => {
            let compare = || compare(&places.model, &places.target, text, &options);
            Some(during(global, "evaluate both models", compare)?)
        }
    };
    let quality = comparison.clone().map(|found| Quality::Comparison(Box::new(found)));
    if let Some(quality) = &quality {
        quality.keep(&places.target)?;
        artifacts::card(places, &finished.report, Some(quality.clone()))?;
    }
    if let Some(file) = &args.html {
        artifacts::page(&places.target, &finished.report, quality, file)?;
    }
    let done = Done { finished, verification, comparison };
    show.result(&done, |out| {
        common::print_summary(&done.finished, out)?;
        if let Some(found) = &done.verification {
            verify::text(found, out)?;
        }
        let Some(found) = &done.comparison else { return Ok(()) };
        writeln!(out, "before: {}", sentence(&found.original))?;
        writeln!(out, "after:  {}", sentence(&found.other))?;
        writeln!(out, "{}", divergence(found))
    })?;
    done.verification.as_ref().map_or(Ok(()), verify::clean)
}

/// Some layers, into a folder of their own.
fn part(args: &Args, recipe: &Recipe, global: &Global, show: &Show) -> Outcome {
    let Places { model, calibration, target } = &args.task.places;
    let source = Checkpoint::open(model)?;
    if InputKind::of(calibration)? == InputKind::Text {
        let reason = "layers depend on each other unless statistics are given: run `calibrate`";
        return Err(Failure::Usage(reason.into()));
    }
    let n = source.layers().len();
    let layers = match (&args.layers, args.part) {
        (Some(layers), _) => layers.clone(),
        (None, Some((i, of))) => n * i / of..n * (i + 1) / of,
        (None, None) => 0..n,
    };
    if layers.is_empty() {
        return Err(Failure::Usage(format!("this share of {n} layers is empty: fewer shares")));
    }
    let pipeline = recipe.builder()?.compute(global.compute()?).build()?;
    let output = args.task.running.output(recipe);
    let progress = Progress::new(global);
    let run = pipeline.run().calibration(calibration).output(output).observer(&progress);
    let report = run.write_part(&source, layers, target);
    progress.done();
    let report = report?;
    show.result(&report, |out| {
        for layer in report.layers() {
            let experts = layer.experts;
            writeln!(out, "{:<18} {} → {}", layer.layer, experts.before, experts.after)?;
        }
        writeln!(out, "{}: a part, for `mcsmoe assemble`", target.display())
    })
}

/// `3/16`.
fn share(text: &str) -> Result<(usize, usize), String> {
    let wrong = || "I/N with I from 0 to N - 1".to_owned();
    let (i, n) = text.split_once('/').ok_or_else(wrong)?;
    match (i.parse::<usize>(), n.parse::<usize>()) {
        (Ok(i), Ok(n)) if i < n => Ok((i, n)),
        _ => Err(wrong()),
    }
}
