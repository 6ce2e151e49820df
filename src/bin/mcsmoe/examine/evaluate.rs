//! `evaluate`: how well a checkpoint predicts text, alone or compared with the original.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::pipeline::{
    Comparison, EvaluateOptions, Evaluation, RepetitionOptions, compare, evaluate, repetition,
};
use serde_json::{Value, json};

use crate::args::Global;
use crate::exit::{Failure, Outcome};
use crate::locate::model_folder;
use crate::progress::during;
use crate::show::Show;

/// Perplexity on text; with --against the divergence from another checkpoint too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint of any export, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    model: PathBuf,
    /// A .txt or .jsonl file, token ids in a .safetensors file, or a folder of these.
    text: PathBuf,
    /// The original: adds KL divergence, top-1 agreement and every layer's output error.
    #[arg(long, value_name = "MODEL")]
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    against: Option<PathBuf>,
    /// Adds the rate of repeated n-grams in greedy continuations.
    #[arg(long, conflicts_with = "against")]
    loops: bool,
    /// Most windows over all files.
    #[arg(long, value_name = "N", default_value = "100")]
    windows: usize,
    /// Tokens of a window; 512, or the model's context if that is less.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
}

pub(crate) fn run(args: &Args, global: &Global, show: &Show) -> Outcome {
    let (max_windows, window) = (args.windows, args.window);
    let options = EvaluateOptions { window, max_windows, ..EvaluateOptions::default() };
    if let Some(original) = &args.against {
        let compare = || compare(original, &args.model, &args.text, &options);
        let found = during(global, "evaluate both models", compare)?;
        return show.result(&found, |out| {
            writeln!(out, "original: {}", sentence(&found.original))?;
            writeln!(out, "model:    {}", sentence(&found.other))?;
            writeln!(out, "{}", divergence(&found))?;
            for layer in &found.layers {
                writeln!(out, "{:<18} output error {:6.2}%", layer.layer, 100.0 * layer.error)?;
            }
            Ok(())
        });
    }
    let found = during(global, "evaluate", || evaluate(&args.model, &args.text, &options))?;
    let repeated = match args.loops {
        true => {
            let loops = || repetition(&args.model, &args.text, &RepetitionOptions::default());
            Some(during(global, "generate continuations", loops)?)
        }
        false => None,
    };
    let mut value = serde_json::to_value(&found).map_err(|e| Failure::Output(e.into()))?;
    if let (Value::Object(members), Some(repeated)) = (&mut value, &repeated) {
        members.insert("loops".into(), json!(repeated));
    }
    show.result(&value, |out| {
        writeln!(out, "{}", sentence(&found))?;
        for file in &found.files {
            let (name, score) = (&file.name, &file.score);
            writeln!(out, "{name:<18} {:10.3} ({} tokens)", score.perplexity, score.tokens)?;
        }
        match &repeated {
            Some(found) => writeln!(out, "repeated n-grams: {:.1}%", 100.0 * found.rate),
            None => Ok(()),
        }
    })
}

/// How far a checkpoint is from the original, in words.
pub(crate) fn divergence(found: &Comparison) -> String {
    let percent = 100.0 * found.agreement;
    format!("KL {:.4} nats, top-1 agreement {percent:.1}%", found.kl)
}

/// The score in words.
pub(crate) fn sentence(found: &Evaluation) -> String {
    let score = &found.score;
    let (perplexity, nll) = (score.perplexity, score.nll);
    format!("perplexity {perplexity:.3} ({nll:.4} nats per token, {} tokens)", score.tokens)
}
