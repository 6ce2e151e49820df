//! `run`: a recipe end to end.

use std::path::PathBuf;

use mcsmoe::pipeline::{Comparison, EvaluateOptions, compare};
use serde::Serialize;

use crate::args::{Global, Method, Running, TextArgs};
use crate::evaluate::sentence;
use crate::exit::Outcome;
use crate::show::Show;
use crate::work::{self, Finished, Places};

/// Carry out a recipe: calibrate, merge, recover, compress, write, and evaluate if asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    method: Method,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    running: Running,
    /// Compare the target with the source on this text, which calibration should not have seen.
    #[arg(long, value_name = "TEXT")]
    evaluate: Option<PathBuf>,
}

#[derive(Serialize)]
struct Done {
    #[serde(flatten)]
    finished: Finished,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<Comparison>,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let recipe = args.method.read("fast", None)?;
    let (places, running) = (&args.places, &args.running);
    let finished = work::execute(places, &recipe, (&args.text, running), global)?;
    let options = EvaluateOptions::default();
    let comparison = match &args.evaluate {
        None => None,
        Some(text) => Some(compare(&places.model, &places.target, text, &options)?),
    };
    let done = Done { finished, comparison };
    show.result(&done, |out| {
        work::tell(&done.finished, out)?;
        let Some(found) = &done.comparison else { return Ok(()) };
        writeln!(out, "before: {}", sentence(&found.original))?;
        writeln!(out, "after:  {}", sentence(&found.other))?;
        let percent = 100.0 * found.agreement;
        writeln!(out, "KL {:.4} nats, top-1 agreement {percent:.1}%", found.kl)
    })
}
