//! `mcsmoe`: merge, then compress the experts of a Mixture-of-Experts checkpoint.
//!
//! Arguments in, library calls, text or JSON out. One file per command, in `produce` and `examine`;
//! what several commands share is in `args` (options), `common` (a run from inputs to summary),
//! `exit` (exit codes), `locate` (folders of models), `show` (output), `progress` (bars).

mod args;
mod artifacts;
mod common;
mod examine;
mod exit;
mod locate;
mod manual;
mod produce;
mod progress;
mod show;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use args::Global;
use examine::{evaluate, generate, inspect, presets, report, verify};
use exit::{Failure, Outcome};
use produce::{assemble, calibrate, compress, convert_stats, merge, plan, run, write_text};
use show::Show;

/// Merge, then compress the experts of a Mixture-of-Experts checkpoint.
#[derive(Debug, Parser)]
#[command(name = "mcsmoe", version, about, after_help = exit::HELP, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(inspect::Args),
    Calibrate(calibrate::Args),
    Presets(presets::Args),
    WriteText(write_text::Args),
    Plan(plan::Args),
    Merge(merge::Args),
    Compress(compress::Args),
    Run(run::Args),
    Assemble(assemble::Args),
    Evaluate(evaluate::Args),
    Generate(generate::Args),
    Verify(verify::Args),
    Report(report::Args),
    ConvertStats(convert_stats::Args),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    let show = Show::new(global.json);
    match start(&global, command, &show) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => show.failure(&failure),
    }
}

fn start(global: &Global, command: Command, show: &Show) -> Outcome {
    if let Some(threads) = global.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|e| Failure::Usage(format!("--threads {threads}: {e}")))?;
    }
    match command {
        Command::Inspect(args) => inspect::run(&args, show),
        Command::Calibrate(args) => calibrate::run(&args, global, show),
        Command::Presets(args) => presets::run(&args, show),
        Command::WriteText(args) => write_text::run(&args, global, show),
        Command::Plan(args) => plan::run(&args, global, show),
        Command::Merge(args) => merge::run(&args, global, show),
        Command::Compress(args) => compress::run(&args, global, show),
        Command::Run(args) => run::run(&args, global, show),
        Command::Assemble(args) => assemble::run(&args, global, show),
        Command::Evaluate(args) => evaluate::run(&args, global, show),
        Command::Generate(args) => generate::run(&args, show),
        Command::Verify(args) => verify::run(&args, global, show),
        Command::Report(args) => report::run(&args, show),
        Command::ConvertStats(args) => convert_stats::run(&args, show),
        Command::Completions(args) => manual::completions::<Cli>(&args, show),
        Command::Man(args) => manual::man::<Cli>(&args),
    }
}
