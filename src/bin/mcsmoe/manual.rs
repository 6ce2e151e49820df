//! `completions` and `man`: what a shell and a reader need.

use std::fs;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::exit::{Failure, Outcome};
use crate::show::Show;

/// Print completions for a shell.
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Write man pages, one per command.
#[derive(Debug, clap::Args)]
pub(crate) struct ManArgs {
    /// The folder; created if it is not there.
    folder: PathBuf,
}

pub(crate) fn completions<C: CommandFactory>(args: &CompletionsArgs, show: &Show) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "mcsmoe", &mut script);
    let script = String::from_utf8_lossy(&script);
    let value = serde_json::json!({ "shell": args.shell.to_string(), "script": script });
    show.result(&value, |out| out.write_all(script.as_bytes()))
}

pub(crate) fn man<C: CommandFactory>(args: &ManArgs) -> Outcome {
    fs::create_dir_all(&args.folder).map_err(Failure::Output)?;
    Ok(clap_mangen::generate_to(C::command(), &args.folder)?)
}
