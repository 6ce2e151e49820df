//! `plan`: what a run will write, need and take, from headers only.

use std::io::{self, Write};
use std::path::PathBuf;

use mcsmoe::Recipe;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{Answer, Output, RunPlan};

use crate::args::{Global, Method, TextArgs, bytes as parse_bytes};
use crate::exit::{Failure, Outcome};
use crate::show::{Show, bytes, change, count, time};
use crate::work::planned;

/// Predict bytes, parameters, memory, time, and who will load the result; reads headers only.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint.
    model: PathBuf,
    #[command(flatten)]
    method: Method,
    #[command(flatten)]
    text: TextArgs,
    /// Plan a run that is given a statistics file instead of text.
    #[arg(long)]
    statistics: bool,
    /// Measure nothing and predict no time.
    #[arg(long)]
    no_time: bool,
    /// Exit with 7 when more memory is needed.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_memory: Option<u64>,
    /// Largest size of a file of weights.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    shard_size: Option<u64>,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    global.compute()?;
    let source = Checkpoint::open(&args.model)?;
    let recipe = args.method.read(Recipe::DEFAULT_PRESET, None)?;
    let shard_bytes = args.shard_size.unwrap_or(recipe.shard_bytes);
    let output = Output { shard_bytes, ..Output::new(recipe.export) };
    let (is_text, measure) = (!args.statistics, !args.no_time);
    let found = planned(&source, &recipe, (&args.text, &output), is_text, measure)?;
    show.result(&found, |out| text(&found, out))?;
    match args.max_memory {
        Some(allowed) if found.memory.peak > allowed => {
            Err(Failure::Memory { needed: found.memory.peak, allowed })
        }
        _ => Ok(()),
    }
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
    if let Some(t) = &found.time {
        let (calibrate, merge) = (time(t.calibrate), time(t.merge));
        let (recover, write, verify) = (time(t.recover), time(t.write), time(t.verify));
        writeln!(out, "time: {} ({} to {})", time(t.total), time(t.range.0), time(t.range.1))?;
        writeln!(
            out,
            "  calibrate {calibrate}, merge {merge}, recover {recover}, write {write}, \
             verify {verify} ({:.0} GFLOP/s{})",
            t.rates.flops / 1e9,
            t.rates.read.map_or(String::new(), |r| format!(", reading {}/s", bytes(r as u64)))
        )?;
    }
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
