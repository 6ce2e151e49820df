//! `verify`: whether a written folder is what it claims to be.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::pipeline::{Verdict, Verification, verify};

use crate::args::Global;
use crate::exit::{Failure, Outcome};
use crate::locate::model_folder;
use crate::progress::during;
use crate::show::Show;

/// Reopen a merged checkpoint and account for every tensor; exit code 6 on any finding.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder that a run has written.
    target: PathBuf,
    /// The checkpoint that it was made of; without it only what the target tells is checked.
    #[arg(long, value_name = "MODEL")]
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    source: Option<PathBuf>,
    /// List what became of every tensor of the source.
    #[arg(long, requires = "source")]
    tensors: bool,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let check = || verify(&args.target, args.source.as_deref());
    let mut found = during(global, "verify", check)?;
    if !args.tensors {
        found.tensors.clear();
    }
    show.result(&found, |out| text(&found, out))?;
    clean(&found)
}

/// A failure if anything was found.
pub(crate) fn clean(found: &Verification) -> Outcome {
    match found.findings().count() {
        0 => Ok(()),
        n => Err(Failure::Verification(n)),
    }
}

/// What was found, for people.
pub(crate) fn text(found: &Verification, out: &mut dyn Write) -> io::Result<()> {
    for tensor in &found.tensors {
        writeln!(out, "{:<11} {} {}", tensor.action, tensor.tensor, tensor.detail)?;
    }
    if !found.account.is_empty() {
        let actions = found.account.iter().map(|(action, n)| format!("{n} {action}"));
        let actions: Vec<String> = actions.collect();
        writeln!(out, "source tensors: {}", actions.join(", "))?;
    }
    for check in &found.checks {
        let verdict = match check.verdict {
            Verdict::Passed => "passed",
            Verdict::Skipped => "skipped",
            Verdict::Failed => "FAILED",
        };
        writeln!(out, "{verdict:<8} {:<8} {}", check.name, check.detail)?;
        for finding in &check.findings {
            writeln!(out, "         {finding}")?;
        }
    }
    Ok(())
}
