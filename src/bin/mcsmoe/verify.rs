//! `verify`: whether a written folder is what it claims to be.

use std::io::{self, Write};
use std::path::PathBuf;

use mcsmoe::pipeline::{Verdict, Verification, verify};

use crate::exit::{Failure, Outcome};
use crate::show::Show;

/// Reopen a merged checkpoint and account for every tensor; exit code 6 on any doubt.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder that a run has written.
    target: PathBuf,
    /// The checkpoint that it was made of; without it only what the target tells is checked.
    #[arg(long, value_name = "MODEL")]
    source: Option<PathBuf>,
    /// List what became of every tensor of the source.
    #[arg(long, requires = "source")]
    tensors: bool,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    let mut found = verify(&args.target, args.source.as_deref())?;
    if !args.tensors {
        found.tensors.clear();
    }
    show.result(&found, |out| text(&found, out))?;
    clean(&found)
}

/// A failure if there is any doubt.
pub(crate) fn clean(found: &Verification) -> Outcome {
    match found.doubts().count() {
        0 => Ok(()),
        n => Err(Failure::Doubt(n)),
    }
}

/// What was found, for people.
pub(crate) fn text(found: &Verification, out: &mut dyn Write) -> io::Result<()> {
    for tensor in &found.tensors {
        writeln!(out, "{:<11} {} {}", tensor.fate, tensor.tensor, tensor.detail)?;
    }
    if !found.account.is_empty() {
        let fates: Vec<String> = found.account.iter().map(|(f, n)| format!("{n} {f}")).collect();
        writeln!(out, "source tensors: {}", fates.join(", "))?;
    }
    for check in &found.checks {
        let verdict = match check.verdict {
            Verdict::Passed => "passed",
            Verdict::Skipped => "skipped",
            Verdict::Doubt => "DOUBT",
        };
        writeln!(out, "{verdict:<8} {:<8} {}", check.name, check.detail)?;
        for doubt in &check.doubts {
            writeln!(out, "         {doubt}")?;
        }
    }
    Ok(())
}
