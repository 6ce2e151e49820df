//! `calibrate`: text through the model, statistics out.

use std::path::PathBuf;
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use mcsmoe::Recipe;
use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::Stack;
use mcsmoe::pipeline::{CalibrateOptions, Keep, Tokens, calibrate_to_file_observed};
use mcsmoe::stage::{Context, Needs};
use serde_json::json;

use crate::args::{Global, TextArgs, bytes};
use crate::exit::Outcome;
use crate::progress::{Progress, peak_memory};
use crate::show::{Show, count, time};

/// Run text through the model, one layer in memory at a time, and write what its routers did.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint.
    model: PathBuf,
    /// A .txt or .jsonl file, token ids in a .safetensors file, or a folder of these.
    text: PathBuf,
    /// The statistics file to write.
    stats: PathBuf,
    /// Collect what this recipe's stages need instead of everything.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Collect what this preset's stages need instead of everything.
    #[arg(long, value_name = "NAME", conflicts_with = "recipe", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(Recipe::PRESETS))]
    preset: Option<String>,
    /// Most samples per layer, spread evenly over the tokens.
    #[arg(long, value_name = "N", default_value = "4096")]
    samples: usize,
    /// Bytes of hidden states in memory; above, they go to a scratch file.
    #[arg(long, value_name = "BYTES", default_value = "2GiB", value_parser = bytes)]
    states_memory: u64,
    /// Print what would be collected and write nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    text_args: TextArgs,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let source = Checkpoint::open(&args.model)?;
    let needs = needs(args)?;
    let TextArgs { tokens, window, text_seed } = args.text_args;
    let tokens = Tokens::read(&source, &args.text, window, tokens, text_seed)?;
    let read = tokens.of(Stack::Causal);
    let collected: Vec<&str> = needs.names().collect();
    let layers = source.layers().len();
    if args.dry_run {
        let value = json!({ "tokens": read, "layers": layers, "collects": collected });
        return show.result(&value, |out| {
            writeln!(out, "{} tokens, {layers} MoE layers", count(read))?;
            writeln!(out, "collects {}", collected.join(", "))
        });
    }
    let options = CalibrateOptions {
        samples: args.samples,
        memory: args.states_memory,
        cx: Context::on(global.compute()?, text_seed),
        ..CalibrateOptions::default()
    };
    let progress = Progress::new(global, &source);
    let start = Instant::now();
    calibrate_to_file_observed(&source, &tokens, needs, &options, &args.stats, &progress)?;
    progress.done();
    let (seconds, peak) = (start.elapsed().as_secs_f64(), peak_memory());
    let held = StatsFile::open(&args.stats)?.layers().len();
    let value = json!({
        "stats": args.stats, "tokens": read, "layers": held, "collects": collected,
        "seconds": seconds, "peak_memory": peak,
    });
    show.result(&value, |out| {
        let path = args.stats.display();
        writeln!(out, "{path}: {held} layers, {} tokens, {}", count(read), time(seconds))
    })
}

fn needs(args: &Args) -> Outcome<Needs> {
    let recipe = match (&args.recipe, &args.preset) {
        (Some(path), _) => Recipe::read(path)?,
        (None, Some(name)) => Recipe::preset(name, Keep::Fraction(0.5))?,
        (None, None) => return Ok(Needs::OBSERVABLE),
    };
    Ok(recipe.builder()?.build()?.needs() | Needs::SAMPLES)
}
