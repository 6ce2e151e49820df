//! `compress`: matrices in factors, after merging or without it.

use clap::ValueEnum;
use mcsmoe::model::Structure;
use mcsmoe::pipeline::{CompressChoice, ExportChoice, Keep};
use mcsmoe::stage::{Portion, Size};

use crate::args::Global;
use crate::common::{self, Task};
use crate::exit::{Failure, Outcome};
use crate::show::Show;

/// Compress the experts' matrices, as a native folder of factors unless another export is asked
/// for; without --keep no expert is merged.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How a matrix is compressed; the recipe's way, or the paper's, unless given.
    #[arg(long, value_enum)]
    by: Option<By>,
    /// Rank of the low-rank part.
    #[arg(long, value_name = "R", default_value = "32")]
    rank: usize,
    /// Share of the rows that stay dense.
    #[arg(long, value_name = "PERCENT", default_value = "10")]
    rows: f64,
    /// Columns stay dense in the place of rows.
    #[arg(long)]
    columns: bool,
    /// Low rank of another rank for every matrix, so that the experts of a native folder have this
    /// size, in percent of the source's.
    #[arg(long, value_name = "PERCENT", conflicts_with_all = ["by", "rank", "rows", "columns"])]
    size: Option<f64>,
    #[command(flatten)]
    task: Task,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum By {
    /// Low rank and the most important rows (the paper).
    LowRankSparse,
    /// Low rank, truncated SVD.
    Svd,
    /// Low rank fitted to the outputs on samples.
    WhitenedSvd,
    /// Dense rows, and low rank fitted to the others.
    Complement,
    /// Dense rows only.
    Sparse,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let mut recipe = args.task.method.read("mc-smoe", Some(Keep::Fraction(1.0)))?;
    if args.task.method.recipe.is_none() {
        recipe.export = args.task.method.export.unwrap_or(ExportChoice::Native);
    }
    let asked = args.by.is_some() || args.size.is_some();
    if asked || recipe.compress.is_none() {
        recipe.compress = Some(choice(args)?);
    }
    common::carry_out(&args.task, &recipe, global, show)
}

fn choice(args: &Args) -> Outcome<CompressChoice> {
    let rows = args.rows / 100.0;
    if !(rows > 0.0 && rows <= 1.0) {
        return Err(Failure::Usage(format!("--rows {}: above 0, at most 100", args.rows)));
    }
    if let Some(percent) = args.size {
        let (size, of) = (Size::Percent(percent), Portion::Experts);
        return Ok(CompressChoice::Size { size, of, least_rank: 1 });
    }
    let (rank, score) = (args.rank, Default::default());
    let structure = if args.columns { Structure::Columns } else { Structure::Rows };
    Ok(match args.by.unwrap_or(By::LowRankSparse) {
        By::LowRankSparse => CompressChoice::LowRankSparse { rank, rows, score, structure },
        By::Svd => CompressChoice::Svd { rank },
        By::WhitenedSvd => CompressChoice::WhitenedSvd { rank },
        By::Complement => CompressChoice::Complement { rank, rows, structure },
        By::Sparse => CompressChoice::Sparse { rows, score, structure },
    })
}
