//! Options that several commands share.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use mcsmoe::calibrate::text::{Conversations, Select, Separator, SpecialTokens, TextOptions};
use mcsmoe::linalg::{Compute, Cpu};
use mcsmoe::pipeline::{ExportChoice, Keep, Output, Recipe};

use crate::exit::{Failure, Outcome};

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// Print one JSON value instead of text; errors too.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Show no progress.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Threads to compute with; all processors unless given. The result does not depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = positive)]
    pub(crate) threads: Option<usize>,
    /// The device to compute on. A device that is absent is an error.
    #[arg(long, global = true, value_name = "NAME", default_value = "cpu")]
    pub(crate) device: String,
}

impl Global {
    /// The device, or why there is none.
    pub(crate) fn compute(&self) -> Outcome<Arc<dyn Compute>> {
        match self.device.as_str() {
            "cpu" => Ok(Arc::new(Cpu::new())),
            other => gpu(other),
        }
    }
}

/// `gpu`, `gpu:2` by index, `gpu:NAME` by a part of the adapter's name.
#[cfg(feature = "gpu")]
fn gpu(device: &str) -> Outcome<Arc<dyn Compute>> {
    use mcsmoe::gpu::{Gpu, Options};
    let options = match device.strip_prefix("gpu:") {
        None if device == "gpu" => Options::default(),
        None => {
            let found = format!("no device `{device}`; there are: cpu, gpu, gpu:INDEX, gpu:NAME");
            return Err(Failure::Usage(found));
        }
        Some(which) => match which.parse() {
            Ok(index) => Options::index(index),
            Err(_) => Options::named(which),
        },
    };
    Ok(Arc::new(Gpu::with(&options)?))
}

#[cfg(not(feature = "gpu"))]
fn gpu(device: &str) -> Outcome<Arc<dyn Compute>> {
    let built = "this tool was built without the feature `gpu`";
    Err(Failure::Usage(format!("no device `{device}`; there is: cpu ({built})")))
}

/// What is done to the experts: a recipe file, or a preset and a few choices.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Method")]
pub(crate) struct Method {
    /// A recipe in TOML, YAML or JSON.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["preset", "keep", "top_k", "seed"])]
    pub(crate) recipe: Option<PathBuf>,
    /// A named recipe; `mcsmoe presets` says what each does. `fast` unless given.
    #[arg(long, value_name = "NAME", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(Recipe::PRESETS))]
    pub(crate) preset: Option<String>,
    /// How many experts stay: `4` per layer, `50%` of them, or `total:96` over all layers.
    #[arg(long, value_name = "HOW MANY", value_parser = keep)]
    pub(crate) keep: Option<Keep>,
    /// What is written: stock (runs anywhere), native (the paper's semantics), expanded (to
    /// check). Unless given, the recipe's or the preset's: native where matrices are compressed
    /// into factors, else stock.
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(EXPORTS).try_map(|name| export(&name)))]
    pub(crate) export: Option<ExportChoice>,
    /// A lower number of experts per token.
    #[arg(long, value_name = "K", value_parser = positive)]
    pub(crate) top_k: Option<usize>,
    /// Seed of every random choice.
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
}

impl Method {
    /// The recipe; `preset` and `keep` where the command line has none.
    pub(crate) fn read(&self, preset: &str, keep: Option<Keep>) -> Outcome<Recipe> {
        let mut recipe = match &self.recipe {
            Some(path) => Recipe::read(path)?,
            None => {
                let Some(keep) = self.keep.or(keep) else {
                    return Err(Failure::Usage("give --keep, or a --recipe".into()));
                };
                let name = self.preset.as_deref().unwrap_or(preset);
                Recipe::preset(name, keep)?
            }
        };
        recipe.export = self.export.unwrap_or(recipe.export);
        recipe.top_k = self.top_k.or(recipe.top_k);
        recipe.seed = self.seed.unwrap_or(recipe.seed);
        Ok(recipe)
    }
}

/// How text becomes tokens.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration text")]
pub(crate) struct TextArgs {
    /// Most calibration tokens, in whole windows drawn by the seed.
    #[arg(long, value_name = "N", default_value = "16384", value_parser = positive)]
    pub(crate) tokens: usize,
    /// Tokens of a window; 512, or the model's context if that is less.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) window: Option<usize>,
    /// Seed of the drawing.
    #[arg(long, value_name = "SEED", default_value = "7")]
    pub(crate) text_seed: u64,
    /// Tokens that the model writes itself beside the text, 8192 for example: they keep what a text
    /// of one kind does not show.
    #[arg(long, value_name = "N", default_value = "0")]
    pub(crate) own_text: usize,
    /// The field of JSON objects that holds the text or the messages; `text`, or a conversation.
    #[arg(long, value_name = "NAME")]
    pub(crate) field: Option<String>,
    /// Shares of the files and subfolders of a folder, `code=0.5,prose=0.5`; equal unless given.
    #[arg(long, value_name = "NAME=SHARE,…", value_delimiter = ',', value_parser = share)]
    pub(crate) mix: Vec<(String, f64)>,
    /// What begins every window: `tokenizer` (as its post-processor says), `bos`, `none`.
    #[arg(long, value_name = "WHICH", default_value = "tokenizer", value_parser = special)]
    pub(crate) special_tokens: SpecialTokens,
    /// The token between two documents, `eos`, `none`, or a token of the vocabulary.
    #[arg(long, value_name = "TOKEN", default_value = "eos", value_parser = separator)]
    pub(crate) separator: Separator,
    /// What makes text of conversations: `model` (its own chat template), `plain` (none), a file.
    #[arg(long, value_name = "FILE", default_value = "model", value_parser = conversations)]
    pub(crate) chat_template: Conversations,
}

impl TextArgs {
    /// How calibration text is cut and chosen.
    pub(crate) fn options(&self) -> TextOptions {
        TextOptions {
            window: self.window,
            select: Select::Tokens(self.tokens),
            seed: self.text_seed,
            field: self.field.clone(),
            mix: self.mix.clone(),
            special_tokens: self.special_tokens,
            separator: self.separator.clone(),
            conversations: self.chat_template.clone(),
        }
    }
}

/// `code=0.5`.
fn share(text: &str) -> Result<(String, f64), String> {
    let wrong = || "a name and its share, code=0.5".to_owned();
    let (name, share) = text.rsplit_once('=').ok_or_else(wrong)?;
    Ok((name.to_owned(), share.parse().map_err(|_| wrong())?))
}

fn special(text: &str) -> Result<SpecialTokens, String> {
    match text {
        "tokenizer" => Ok(SpecialTokens::Tokenizer),
        "bos" => Ok(SpecialTokens::Bos),
        "none" => Ok(SpecialTokens::None),
        _ => Err("tokenizer, bos or none".into()),
    }
}

fn separator(text: &str) -> Result<Separator, std::convert::Infallible> {
    Ok(match text {
        "eos" => Separator::Eos,
        "none" => Separator::None,
        token => Separator::Token(token.to_owned()),
    })
}

fn conversations(text: &str) -> Result<Conversations, std::convert::Infallible> {
    Ok(match text {
        "model" => Conversations::Template,
        "plain" => Conversations::Plain,
        file => Conversations::File(file.into()),
    })
}

/// How a run is carried out.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Run")]
pub(crate) struct Running {
    /// Go on from where a run that was stopped (Ctrl-C) or killed has come to; refused when its
    /// inputs were others.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the plan and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Refuse to start when the plan needs more; hidden states go to a scratch file before that.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) max_memory: Option<u64>,
    /// Largest size of a file of weights.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) shard_size: Option<u64>,
}

impl Running {
    /// What is written, and how.
    pub(crate) fn output(&self, recipe: &Recipe) -> Output {
        let shard_bytes = self.shard_size.unwrap_or(recipe.shard_bytes);
        Output { shard_bytes, resume: self.resume, ..Output::new(recipe.export) }
    }
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("a number above 0".into()),
    }
}

/// `4`, `50%`, `total:96`.
fn keep(text: &str) -> Result<Keep, String> {
    let wrong = || "a number per layer (4), a share (50%), or total:96".to_owned();
    if let Some(total) = text.strip_prefix("total:") {
        return positive(total).map(Keep::Total).map_err(|_| wrong());
    }
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
        return Ok(Keep::Fraction(percent / 100.0));
    }
    positive(text).map(Keep::Experts).map_err(|_| wrong())
}

const EXPORTS: [&str; 3] = ["stock", "native", "expanded"];

fn export(text: &str) -> Result<ExportChoice, String> {
    match text {
        "stock" => Ok(ExportChoice::Stock),
        "native" => Ok(ExportChoice::Native),
        "expanded" => Ok(ExportChoice::Expanded),
        _ => Err("stock, native or expanded".into()),
    }
}

/// `5000000000`, `5G` or `5GB` (powers of 1000), `5GiB` (powers of 1024).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "a number of bytes such as 5000000, 500M, 5GB or 4GiB".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_ascii_lowercase();
    let power = match unit.chars().next() {
        None | Some('b') => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some(_) => return Err(wrong()),
    };
    let base: f64 = match unit.get(1..) {
        _ if power == 0 && unit.len() < 2 => 1.0,
        Some("" | "b") if power > 0 => 1000.0,
        Some("ib") if power > 0 => 1024.0,
        _ => return Err(wrong()),
    };
    let value = (number * base.powi(power)).round();
    if value >= 1.0 && value < 2f64.powi(63) { Ok(value as u64) } else { Err(wrong()) }
}

/// Layers `a..b` of those that `inspect` lists, counted from 0, the last excluded.
pub(crate) fn range(text: &str) -> Result<std::ops::Range<usize>, String> {
    let wrong = || "a range such as 0..8, the end excluded".to_owned();
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let parse = |part: &str| part.trim().parse::<usize>().map_err(|_| wrong());
    let (start, end) = (parse(start)?, parse(end)?);
    if start < end { Ok(start..end) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test fails by panicking.
    use super::*;

    #[test]
    fn sizes_shares_and_ranges_are_read_or_refused() {
        assert_eq!(bytes("700000").unwrap(), 700_000);
        assert_eq!(bytes("1.5G").unwrap(), 1_500_000_000);
        assert_eq!((bytes("4GiB").unwrap(), bytes("2kB").unwrap()), (4 << 30, 2000));
        assert!(["", "x", "0", "5X", "5GG", "1e9", "-1", "5bib"].iter().all(|s| bytes(s).is_err()));
        assert_eq!(keep("4").unwrap(), Keep::Experts(4));
        assert_eq!(keep("50%").unwrap(), Keep::Fraction(0.5));
        assert_eq!(keep("total:96").unwrap(), Keep::Total(96));
        assert!(["0", "half", "total:", "0.5"].iter().all(|s| keep(s).is_err()));
        assert_eq!(range("2..5").unwrap(), 2..5);
        assert!(["5", "5..5", "..3", "3.."].iter().all(|s| range(s).is_err()));
    }
}
