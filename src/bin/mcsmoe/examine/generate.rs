//! `generate`: a greedy continuation, as a sanity check.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::pipeline::generate;
use serde_json::json;

use crate::exit::Outcome;
use crate::locate::model_folder;
use crate::show::Show;

/// The most likely continuation of a prompt.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint of any export, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    model: PathBuf,
    /// The text to go on from.
    prompt: String,
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value = "64")]
    tokens: usize,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    let text = generate(&args.model, &args.prompt, args.tokens)?;
    let value = json!({ "prompt": args.prompt, "continuation": text });
    show.result(&value, |out| writeln!(out, "{text}"))
}
