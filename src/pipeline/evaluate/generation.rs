//! Greedy continuations, and how much they repeat themselves.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::calibrate::text::{Select, Text, TextOptions, TextRecord, Vocabulary};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::forward::Model;
use crate::pipeline::activations::model::EvalModel;
use crate::stage::Context;

/// What is continued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RepetitionOptions {
    /// Number of prompts, drawn from the text by the seed.
    pub prompts: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a continuation, if no end token comes first.
    pub new_tokens: usize,
    /// `n`: tokens that count as a repetition when they recur together.
    pub ngram: usize,
    /// Seed of the drawing.
    pub seed: u64,
}

impl Default for RepetitionOptions {
    fn default() -> Self {
        Self { prompts: 16, prompt: 32, new_tokens: 128, ngram: 4, seed: 0 }
    }
}

/// How much greedy continuations repeat themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Repetition {
    /// `1 − distinct / all` n-grams, each continuation by itself, over all continuations: 0 when
    /// nothing recurs, near 1 when a model is caught in a loop.
    pub rate: f64,
    /// All n-grams.
    pub ngrams: u64,
    /// Generated tokens.
    pub tokens: u64,
    /// What was asked.
    pub options: RepetitionOptions,
    /// Where the prompts are from.
    pub text: TextRecord,
}

/// The rate of repeated n-grams in greedy continuations of prompts from `text`. Merged models that
/// lost too much repeat themselves before their perplexity tells.
///
/// Encoder-decoder models fill the spans that corruption hides in a prompt. All layers of a decoder
/// are in memory while it generates.
///
/// # Errors As [`evaluate`](crate::pipeline::evaluate);
/// [`OutOfRange`](crate::ErrorKind::OutOfRange) when prompt and continuation are longer than the
/// model's context, or `ngram` is 0.
pub fn repetition(folder: &Path, text: &Path, options: &RepetitionOptions) -> Result<Repetition> {
    if options.ngram == 0 {
        return Err(crate::Error::range("ngram", "at least 1", 0));
    }
    let checkpoint = Checkpoint::open(folder)?;
    let subject = EvalModel::open(&checkpoint, &Context::cpu(options.seed))?;
    let drawn = Select::Tokens(options.prompts.saturating_mul(options.prompt));
    let cut = TextOptions::new(options.prompt).select(drawn).seed(options.seed);
    let text = Text::read(text, folder, subject.limits(), &cut)?;
    let prompts: Vec<Vec<u32>> = text.windows().map(<[u32]>::to_vec).collect();
    let new = continuations(&subject, &prompts, options.new_tokens, options.seed)?;
    let (mut distinct, mut all) = (0, 0);
    for tokens in &new {
        distinct += tokens.windows(options.ngram).collect::<HashSet<_>>().len();
        all += tokens.windows(options.ngram).len();
    }
    Ok(Repetition {
        rate: if all == 0 { 0.0 } else { 1.0 - distinct as f64 / all as f64 },
        ngrams: all as u64,
        tokens: new.iter().map(|tokens| tokens.len() as u64).sum(),
        options: options.clone(),
        text: text.record().clone(),
    })
}

/// The most likely continuation of `prompt`, at most `max_new` tokens, as text. Encoder-decoder
/// models read the prompt as it is, and may be given sentinels (`<extra_id_0>`) to fill. The prompt
/// gets the special tokens that the tokenizer puts around a text; the end tokens are those of
/// `config.json` and `generation_config.json`.
///
/// # Errors
/// As [`repetition`], and those of the tokenizer.
pub fn generate(folder: &Path, prompt: &str, max_new: usize) -> Result<String> {
    let checkpoint = Checkpoint::open(folder)?;
    let subject = EvalModel::open(&checkpoint, &Context::cpu(0))?;
    let vocabulary = Vocabulary::open(folder)?;
    let prompt = [vocabulary.encode_whole(prompt)?];
    vocabulary.check(&prompt[0], subject.limits().vocab)?;
    let new = match &subject.model {
        Model::Causal(model) => model.generate_each(&prompt, max_new)?,
        Model::Switch(model) => model.generate_each(&prompt, max_new)?,
    };
    let (mut new, ends) = (new.concat(), vocabulary.ends()?);
    if let Some(end) = new.iter().position(|id| ends.contains(id)) {
        new.truncate(end + 1);
    }
    vocabulary.decode(&new)
}

fn continuations(
    subject: &EvalModel<'_>,
    prompts: &[Vec<u32>],
    max_new: usize,
    seed: u64,
) -> Result<Vec<Vec<u32>>> {
    let model = match &subject.model {
        Model::Causal(model) => return model.generate_each(prompts, max_new),
        Model::Switch(model) => model,
    };
    let corruption = subject.corruption()?;
    let input = |(w, prompt): (usize, &Vec<u32>)| {
        Ok(corruption.corrupt(prompt, seed.wrapping_add(w as u64))?.0)
    };
    let inputs = prompts.iter().enumerate().map(input).collect::<Result<Vec<_>>>()?;
    model.generate_each(&inputs, max_new)
}
