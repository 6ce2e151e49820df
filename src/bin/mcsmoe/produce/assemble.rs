//! `assemble`: the parts of a run, joined.

use std::path::PathBuf;
use std::time::Instant;

use mcsmoe::calibrate::InputKind;
use mcsmoe::checkpoint::Checkpoint;

use crate::args::{Global, Method, Running};
use crate::artifacts;
use crate::common::{self, Finished, Places};
use crate::exit::{Failure, Outcome};
use crate::progress::Progress;
use crate::show::Show;

/// Join what `run --layers` or `run --part` has written, with the options of those runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    places: Places,
    /// The folders to join.
    #[arg(required = true)]
    parts: Vec<PathBuf>,
    #[command(flatten)]
    method: Method,
    #[command(flatten)]
    running: Running,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let start = Instant::now();
    let recipe = args.method.read("fast", None)?;
    let Places { model, calibration, target } = &args.places;
    let source = Checkpoint::open(model)?;
    if InputKind::of(calibration)? == InputKind::Text {
        return Err(Failure::Usage("parts are made from a statistics file: give that".into()));
    }
    let pipeline = recipe.builder()?.compute(global.compute()?).build()?;
    let output = args.running.output(&recipe);
    let progress = Progress::new(global);
    let run = pipeline.run().calibration(calibration).output(output).observer(&progress);
    let report = run.assemble(&source, &args.parts, target);
    progress.done();
    let report = report?;
    artifacts::card(&args.places, &report, None)?;
    let done = Finished::now(target, start, report);
    show.result(&done, |out| common::print_summary(&done, out))
}
