//! `merge`: fewer experts, by a preset or a recipe, without compression.

use crate::args::{Global, Method, Running, TextArgs};
use crate::exit::Outcome;
use crate::show::Show;
use crate::work::{self, Places};

/// Merge the experts of a checkpoint; matrices stay dense.
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
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let mut recipe = args.method.read("fast", None)?;
    recipe.compress = None;
    work::carry_out(&args.places, &recipe, (&args.text, &args.running), global, show)
}
