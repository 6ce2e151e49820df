//! `plan`: what a run will write, need and compute, from headers only.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::Recipe;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{Answer, Output, RunPlan};

use crate::args::{Global, Method, TextArgs, bytes as parse_bytes};
use crate::common::planned;
use crate::exit::{Failure, Outcome};
use crate::locate::model_folder;
use crate::show::{Show, bytes, change, count};

/// Predict bytes, parameters, memory and cost, and which runtimes will load the result. Reads
/// headers only.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    model: PathBuf,
    /// Plan a run that is given a statistics file instead of text.
    #[arg(long)]
    statistics: bool,
    /// Exit with 7 when more memory is needed.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_memory: Option<u64>,
    /// Largest size of a file of weights.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    shard_size: Option<u64>,
    #[command(flatten)]
    method: Method,
    #[command(flatten)]
    text: TextArgs,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    global.compute()?;
    let source = Checkpoint::open(&args.model)?;
    let recipe = args.method.read(Recipe::DEFAULT_PRESET, None)?;
    let shard_bytes = args.shard_size.unwrap_or(recipe.shard_bytes);
    let output = Output { shard_bytes, ..Output::new(recipe.export) };
    let found = planned(&source, &recipe, (&args.text, &output), !args.statistics)?;
    show.result(&found, |out| text(&found, out))?;
    match args.max_memory {
        Some(allowed) if found.memory.peak > allowed => {
            Err(Failure::Memory { needed: found.memory.peak, allowed })
        }
        _ => Ok(()),
    }
}

/// `1.2 TFLOP`.
fn flops(n: u64) -> String {
    const UNITS: [&str; 4] = ["GFLOP", "TFLOP", "PFLOP", "EFLOP"];
    let (mut value, mut unit) = (n as f64 / 1e9, 0);
    while value >= 999.95 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn multiple(calibrations: Option<f64>) -> String {
    calibrations.map_or(String::new(), |n| format!(", {n:.1} times the calibration"))
}

/// The plan for people.
pub(crate) fn text(found: &RunPlan, out: &mut dyn Write) -> io::Result<()> {
    let export = format!("{:?}", found.export).to_lowercase();
    writeln!(out, "{} (layout {}), {export} export", found.family, found.layout)?;
    let layers = format!("experts in {} layers", found.layers);
    change(out, &layers, found.experts, count)?;
    if found.spread {
        writeln!(out, "  spread over layers by the grouper; the sum is what is asked for")?;
    }
    change(out, "parameters", found.parameters, count)?;
    change(out, "expert bytes", found.expert_bytes, bytes)?;
    change(out, "tensor bytes", found.tensor_bytes, bytes)?;
    change(out, "MoE FLOPs per token", found.flops_per_token, count)?;
    writeln!(out, "files of tensors: {}", found.shards)?;
    for (why, n) in &found.dropped {
        writeln!(out, "left out: {n} tensors, {why}")?;
    }
    let memory = &found.memory;
    let phases =
        [("calibrate", memory.calibrate), ("measure", memory.measure), ("merge", memory.merge)];
    let phases: Vec<String> =
        phases.iter().map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
    writeln!(out, "peak memory: {} ({})", bytes(memory.peak), phases.join(", "))?;
    if memory.scratch > 0 {
        writeln!(out, "scratch file: {}", bytes(memory.scratch))?;
    }
    let cost = &found.cost;
    writeln!(out, "compute: {}{}", flops(cost.total), multiple(cost.calibrations))?;
    let phases = [("calibrate", cost.calibrate), ("merge", cost.merge), ("recover", cost.recover)];
    let phases: Vec<String> =
        phases.iter().map(|(name, n)| format!("{name} {}", flops(*n))).collect();
    writeln!(out, "  {}", phases.join(", "))?;
    let (read, written) = (bytes(cost.read_bytes), bytes(cost.write_bytes));
    writeln!(out, "files: {read} read, {written} written")?;
    for runtime in &found.runtimes {
        let answer = match runtime.answer {
            Answer::Accepts => "accepts",
            Answer::Refuses => "refuses",
            Answer::Unknown => "unknown",
        };
        writeln!(out, "{:<13} {answer}", runtime.runtime)?;
        for line in runtime.reasons.iter().chain(&runtime.notes) {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}
