//! How text is cut into windows, and which of them are used.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which windows are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// All.
    #[default]
    All,
    /// The first of every source, the same number of each: this many over all sources, rounded
    /// down, but at least one of each.
    Windows(usize),
    /// Windows drawn by the seed without replacement, as many as fit in this number of tokens, at
    /// least one. Every source gives the same number, or its share of
    /// [`TextOptions::mix`]; what a source lacks the others give. In the order of the text.
    Tokens(usize),
}

/// Which special tokens begin every window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialTokens {
    /// Those that the post-processor of `tokenizer.json` puts before a text; most often BOS or
    /// none.
    #[default]
    Tokenizer,
    /// BOS, whatever the post-processor says.
    Bos,
    /// None.
    None,
}

/// What stands between two documents.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Separator {
    /// The model's end-of-sequence token, if it has one.
    #[default]
    Eos,
    /// Nothing.
    None,
    /// A token of the vocabulary, by its text.
    Token(String),
}

/// What turns conversations into text.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conversations {
    /// The model's own chat template.
    #[default]
    Template,
    /// A chat template in a file.
    File(PathBuf),
    /// No template: the contents, with an empty line between two.
    Plain,
}

/// How text is cut into windows, and which of them are used.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextOptions {
    /// Tokens per window, special tokens included. `None`: [`Limits::usual`](super::Limits).
    pub window: Option<usize>,
    /// Which windows are used.
    pub select: Select,
    /// Seed of the drawing.
    pub seed: u64,
    /// The field of JSON objects that holds the text or the conversation. `None`: `text`, else a
    /// conversation.
    pub field: Option<String>,
    /// Shares of sources by name, in any unit. Empty: equal ones.
    pub mix: Vec<(String, f64)>,
    /// Which special tokens begin every window.
    pub special_tokens: SpecialTokens,
    /// What stands between two documents.
    pub separator: Separator,
    /// What turns conversations into text.
    pub conversations: Conversations,
}

impl TextOptions {
    /// All windows of this length.
    pub fn new(window: usize) -> Self {
        Self { window: Some(window), ..Self::default() }
    }

    /// The same with another choice of windows.
    #[must_use]
    pub fn select(mut self, select: Select) -> Self {
        self.select = select;
        self
    }

    /// The same with another seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

/// How much text a model writes, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OwnTextOptions {
    /// Tokens in all, in whole sequences: the first token of each is not the model's.
    pub tokens: usize,
    /// Tokens of a sequence. Of sequences of 2, 4, 8, 16, 32 and 512 tokens, those of 16 and more
    /// serve a least-squares fit best, and about alike.
    pub length: usize,
    /// Divides the logits; at 1 the model writes what it believes.
    pub temperature: f64,
    /// Seed of the first tokens and of the drawing.
    pub seed: u64,
    /// Bytes for layers, keys and values that stay in memory between two positions.
    pub memory: u64,
}

impl Default for OwnTextOptions {
    fn default() -> Self {
        Self { tokens: 8192, length: 32, temperature: 1.0, seed: 7, memory: 2 << 30 }
    }
}
