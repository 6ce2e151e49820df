//! `merge`: fewer experts, by a preset or a recipe, without compression.

use mcsmoe::Recipe;

use crate::args::Global;
use crate::common::{self, Task};
use crate::exit::Outcome;
use crate::show::Show;

/// Merge the experts of a checkpoint; matrices stay dense.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    task: Task,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let mut recipe = args.task.method.read(Recipe::DEFAULT_PRESET, None)?;
    recipe.compress = None;
    common::carry_out(&args.task, &recipe, global, show)
}
