//! How well a checkpoint predicts text.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::calibrate::text::{Limits, Select, Text, TextOptions, TextRecord};
use crate::checkpoint::Checkpoint;
use crate::error::{Locate, Result};
use crate::model::Finite;
use crate::pipeline::activations::model::{EvalModel, Sequences};
use crate::stage::Context;

/// What is evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateOptions {
    /// Tokens per window; by default 512, or the model's context if that is less, and 256 for span
    /// corruption.
    pub window: Option<usize>,
    /// Windows over all files, the first of each; at least one of each.
    pub max_windows: usize,
    /// Seed of span corruption.
    pub seed: u64,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self { window: None, max_windows: 100, seed: 1234 }
    }
}

impl EvaluateOptions {
    /// Reads the text that is asked for.
    pub(crate) fn read(&self, model: &EvalModel<'_>, path: &Path, limits: Limits) -> Result<Text> {
        let options = TextOptions {
            window: self.window,
            select: Select::Windows(self.max_windows),
            seed: self.seed,
            ..TextOptions::default()
        };
        Text::read(path, model.checkpoint.dir(), limits, &options)
    }
}

/// What the model is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Every token of a window but the first, from those before it.
    CausalLm,
    /// The spans that T5's span corruption hides, end token included.
    SpanCorruption,
}

/// Cross-entropy over some tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Mean of `−ln p(token)`, in nats.
    pub nll: f64,
    /// `e^nll`.
    pub perplexity: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

impl Score {
    /// Of a sum of nats over tokens.
    pub(crate) fn of(sum: f64, tokens: u64) -> Self {
        let nll = if tokens == 0 { 0.0 } else { sum / tokens as f64 };
        Self { nll, perplexity: nll.exp(), tokens }
    }
}

/// The score of one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileScore {
    /// The file's name without its ending.
    pub name: String,
    /// Its score.
    #[serde(flatten)]
    pub score: Score,
}

/// How well a checkpoint predicts a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The model type; of a native folder that of the original.
    pub family: String,
    /// What was asked.
    pub task: Task,
    /// Parameters of the whole model.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Over all files.
    #[serde(flatten)]
    pub score: Score,
    /// File by file.
    pub files: Vec<FileScore>,
    /// The text.
    pub text: TextRecord,
}

impl Evaluation {
    /// Indented JSON.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) if it cannot be written.
    pub fn to_json(&self) -> Result<String> {
        crate::pipeline::json("evaluation", self)
    }
}

/// Perplexity of the checkpoint in `folder` on `text`, a file or a folder of files (see
/// [`calibrate::text`](crate::calibrate::text)), over windows that do not overlap.
///
/// Works on stock, native and expanded folders of every family with a native forward pass. All
/// windows go through a layer before the next is read, so one layer is in memory at a time, and
/// `4 · t · d_model` bytes for `t` tokens. Computed in `f32`, whatever the type on disk.
///
/// Encoder-decoder models are asked for the spans that T5's corruption hides (density 0.15, mean
/// span 3); the seed of window `w` of file `f` is `seed + 1000 f + w`.
///
/// # Errors
/// Those of [`Checkpoint::open`], of [`Text::read`], and of the forward pass:
/// [`Unsupported`](crate::ErrorKind::Unsupported) for another family,
/// [`NotFinite`](crate::ErrorKind::NotFinite) with the layer for weights or activations that are
/// NaN or infinite.
///
/// # Example
/// ```no_run
/// use std::path::Path;
/// use mcsmoe::pipeline::{EvaluateOptions, evaluate};
///
/// let options = EvaluateOptions::default();
/// let result = evaluate(Path::new("mixtral"), Path::new("text"), &options)?;
/// println!("perplexity {:.3}", result.score.perplexity);
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn evaluate(folder: &Path, text: &Path, options: &EvaluateOptions) -> Result<Evaluation> {
    let checkpoint = Checkpoint::open(folder)?;
    let cx = Context::cpu(options.seed);
    let subject = EvalModel::open(&checkpoint, &cx)?;
    let text = options.read(&subject, text, subject.limits())?;
    let items = subject.items(&text, options.seed)?;
    let ran = subject.run(&items, None)?;
    let single = |w: usize| {
        let targets = items.targets(w);
        let terms = ran.head.nll(ran.states(w, targets.len()), targets, &cx)?;
        terms.check_finite("negative log-likelihood").in_file(folder)?;
        Ok((terms.iter().sum(), terms.len() as u64))
    };
    let windows = (0..items.len()).map(single).collect::<Result<Vec<_>>>()?;
    Ok(summary(&subject, &items, &text, &windows))
}

/// Sums over files, from sums and numbers of tokens per window.
pub(crate) fn summary(
    subject: &EvalModel<'_>,
    items: &Sequences,
    text: &Text,
    windows: &[(f64, u64)],
) -> Evaluation {
    let total = |part: &[(f64, u64)]| {
        Score::of(part.iter().map(|w| w.0).sum(), part.iter().map(|w| w.1).sum())
    };
    let mut rest = windows;
    let mut files = Vec::new();
    for source in text.sources() {
        let (own, later) = rest.split_at(source.windows.len().min(rest.len()));
        rest = later;
        files.push(FileScore { name: source.name.clone(), score: total(own) });
    }
    Evaluation {
        family: subject.checkpoint.family().into(),
        task: match items {
            Sequences::Causal(_) => Task::CausalLm,
            Sequences::Pairs(_) => Task::SpanCorruption,
        },
        parameters: subject.checkpoint.total_parameters(),
        bytes: subject.checkpoint.total_bytes(),
        score: total(windows),
        files,
        text: text.record().clone(),
    }
}
