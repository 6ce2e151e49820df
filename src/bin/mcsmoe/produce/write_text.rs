//! `write-text`: text of the model's own, to calibrate on.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mcsmoe::Error;
use mcsmoe::calibrate::text::Vocabulary;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::error::Locate;
use mcsmoe::pipeline::{OwnTextOptions, Tokens, own_text};
use mcsmoe::stage::Context;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::args::{Global, bytes};
use crate::exit::{Failure, Outcome};
use crate::show::{Show, count, time};

/// Let the model write text to calibrate on: many short sequences, each from a random first token.
/// The file of token ids can be given as TEXT, alone or in a folder beside text of your own.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint.
    model: PathBuf,
    /// The file of token ids to write (.safetensors); it must not exist.
    ids: PathBuf,
    /// Tokens to write.
    #[arg(long, value_name = "N", default_value = "8192")]
    tokens: usize,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N", default_value = "32")]
    length: usize,
    /// Divides the logits: below 1 the likely tokens are likelier still.
    #[arg(long, value_name = "T", default_value = "1")]
    temperature: f64,
    /// Seed of the first tokens and of the drawing.
    #[arg(long, value_name = "SEED", default_value = "7")]
    text_seed: u64,
    /// Bytes for layers, keys and values that stay in memory between two positions.
    #[arg(long, value_name = "BYTES", default_value = "2GiB", value_parser = bytes)]
    memory: u64,
    /// Write the sequences as text too, a JSON object with a `text` field a line; it must not
    /// exist.
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    if args.ids.extension().is_none_or(|ending| ending != "safetensors") {
        let found = format!("{}: token ids are a .safetensors file", args.ids.display());
        return Err(Failure::Usage(found));
    }
    let source = Checkpoint::open(&args.model)?;
    let options = OwnTextOptions {
        tokens: args.tokens,
        length: args.length,
        temperature: args.temperature,
        seed: args.text_seed,
        memory: args.memory,
    };
    let start = Instant::now();
    let written = own_text(&source, &options, &Context::on(global.compute()?, args.text_seed))?;
    let Tokens::Windows(windows) = &written else {
        return Err(Failure::Usage("the model wrote no windows of text".into()));
    };
    write_ids(&args.ids, windows)?;
    if let Some(path) = &args.jsonl {
        write_text(path, &Vocabulary::open(&args.model)?, windows)?;
    }
    let (tokens, seconds) = (windows.iter().map(Vec::len).sum::<usize>(), elapsed(start));
    let value = json!({
        "ids": args.ids, "text": args.jsonl, "sequences": windows.len(), "tokens": tokens,
        "options": options, "seconds": seconds,
    });
    show.result(&value, |out| {
        let (path, tokens) = (args.ids.display(), count(tokens as u64));
        writeln!(out, "{path}: {} sequences, {tokens} tokens, {}", windows.len(), time(seconds))
    })
}

fn elapsed(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

/// One tensor `[windows, length]` of `I32`.
fn write_ids(path: &Path, windows: &[Vec<u32>]) -> Outcome {
    let shape = vec![windows.len(), windows.first().map_or(0, Vec::len)];
    let ids: Vec<u8> = windows.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
    let format = |e: safetensors::SafeTensorError| Error::io("write", std::io::Error::other(e));
    let view = TensorView::new(Dtype::I32, shape, &ids).map_err(format)?;
    let whole = safetensors::serialize([("input_ids", view)], None).map_err(format)?;
    create(path, |file| file.write_all(&whole))
}

fn write_text(path: &Path, vocabulary: &Vocabulary, windows: &[Vec<u32>]) -> Outcome {
    let mut lines = String::new();
    for window in windows {
        lines.push_str(&json!({ "text": vocabulary.decode(window)? }).to_string());
        lines.push('\n');
    }
    create(path, |file| file.write_all(lines.as_bytes()))
}

/// A new file; what exists is never overwritten.
fn create(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Outcome {
    let written = File::create_new(path).and_then(|mut file| write(&mut file));
    Ok(written.map_err(|e| Error::io("create", e)).in_file(path)?)
}
