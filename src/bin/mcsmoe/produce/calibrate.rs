//! `calibrate`: text through the model, statistics out.

use std::path::PathBuf;
use std::time::Instant;

use clap::builder::{PathBufValueParser, PossibleValuesParser, TypedValueParser};
use mcsmoe::Recipe;
use mcsmoe::calibrate::{InputKind, StatsFile};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::Stack;
use mcsmoe::pipeline::{CalibrateOptions, Keep, TextTokens, calibrate};
use mcsmoe::stage::{Context, Needs};
use serde_json::json;

use crate::args::{Global, TextArgs, bytes};
use crate::common::read_text;
use crate::exit::{Failure, Outcome};
use crate::locate::model_folder;
use crate::progress::{Progress, peak_memory};
use crate::show::{Show, count, time};

/// Run text through the model, one layer in memory at a time, and write what its routers did.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    model: PathBuf,
    /// Text (.txt, .jsonl, .json, also .gz and .zst), token ids (.safetensors), or a folder.
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
    /// Replace the statistics file if it is there. A file that is no statistics file stays.
    #[arg(long)]
    force: bool,
    /// Print what would be collected and write nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    text_args: TextArgs,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let source = Checkpoint::open(&args.model)?;
    let needs = needs(args)?;
    if !args.dry_run {
        check_target(args)?;
    }
    let TextTokens { tokens, record } = read_text(&source, &args.text, &args.text_args, global)?;
    let read = tokens.of(Stack::Causal);
    let collected: Vec<&str> = needs.names().collect();
    let layers = source.layers().len();
    if args.dry_run {
        let value = json!({
            "tokens": read, "layers": layers, "collects": collected, "text": record,
        });
        return show.result(&value, |out| {
            writeln!(out, "{} tokens, {layers} MoE layers", count(read))?;
            writeln!(out, "collects {}", collected.join(", "))
        });
    }
    let options = CalibrateOptions {
        samples: args.samples,
        memory: args.states_memory,
        cx: Context::on(global.compute()?, args.text_args.text_seed),
        ..CalibrateOptions::default()
    };
    let progress = Progress::new(global);
    let start = Instant::now();
    calibrate(&source, &tokens, needs)
        .options(options)
        .observer(&progress)
        .text(&record)
        .write(&args.stats)?;
    progress.done();
    let (seconds, peak) = (start.elapsed().as_secs_f64(), peak_memory());
    let held = StatsFile::open(&args.stats)?.layers().len();
    let value = json!({
        "stats": args.stats, "tokens": read, "layers": held, "collects": collected,
        "seconds": seconds, "peak_memory": peak, "text": record,
    });
    show.result(&value, |out| {
        let path = args.stats.display();
        writeln!(out, "{path}: {held} layers, {} tokens, {}", count(read), time(seconds))
    })
}

/// Refuses to write over a file, but over statistics with --force.
fn check_target(args: &Args) -> Outcome {
    let Args { stats, force, .. } = args;
    if !stats.exists() {
        return Ok(());
    }
    let shown = stats.display();
    if !force {
        return Err(Failure::Usage(format!("{shown} exists; --force replaces a statistics file")));
    }
    match InputKind::of(stats) {
        Ok(InputKind::Statistics) => Ok(()),
        _ => Err(Failure::Usage(format!("{shown} is no statistics file: it stays as it is"))),
    }
}

fn needs(args: &Args) -> Outcome<Needs> {
    let recipe = match (&args.recipe, &args.preset) {
        (Some(path), _) => Recipe::read(path)?,
        (None, Some(name)) => Recipe::preset(name, Keep::Fraction(0.5))?,
        (None, None) => return Ok(Needs::OBSERVABLE),
    };
    Ok(recipe.builder()?.build()?.needs() | Needs::SAMPLES)
}
