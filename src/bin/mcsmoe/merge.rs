//! `merge`: fewer experts, by a preset or a recipe, without compression.

use crate::args::Global;
use crate::exit::Outcome;
use crate::show::Show;
use crate::work::{self, Task};

/// Merge the experts of a checkpoint; matrices stay dense.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    task: Task,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let mut recipe = args.task.method.read("fast", None)?;
    recipe.compress = None;
    work::carry_out(&args.task, &recipe, global, show)
}
