//! Where the statistics of a run come from.

use std::path::{Path, PathBuf};

use crate::calibrate::text::{Select, TextOptions};
use crate::calibrate::{InputKind, StatsFile};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::pipeline::activations::tokens::{TextTokens, Tokens};

/// Where the statistics of a run come from: a file, or text that is run through the model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant)] // There is one in a run.
pub enum Calibration {
    /// A statistics file.
    Statistics(PathBuf),
    /// Token ids; at most 4096 tokens of each layer, spread evenly, are samples.
    Tokens(Tokens),
    /// Token ids of a text that was read, with its record.
    Read(TextTokens),
    /// A text file, or a folder of them, tokenised by the checkpoint's own tokenizer; for
    /// encoder-decoder models with span corruption. See [`text`](crate::calibrate::text).
    Text {
        /// The file or folder.
        path: PathBuf,
        /// How it is cut into windows, and which of them are used.
        options: TextOptions,
    },
}

impl Calibration {
    /// Windows of `window` tokens, drawn from a text file or a folder of them by `seed`, as many as
    /// fit in `max_tokens`.
    pub fn text(path: impl Into<PathBuf>, window: usize, max_tokens: usize, seed: u64) -> Self {
        let options = TextOptions::new(window).select(Select::Tokens(max_tokens)).seed(seed);
        Self::Text { path: path.into(), options }
    }

    /// Whatever lies at `path`: a statistics file, or text or token ids, which are cut as
    /// [`Tokens::read`] says; [`InputKind::of`] tells which.
    ///
    /// # Errors
    /// Those of [`StatsFile::open`] and [`Tokens::read`].
    pub fn read(
        source: &Checkpoint,
        path: &Path,
        window: Option<usize>,
        max_tokens: usize,
        seed: u64,
    ) -> Result<Self> {
        if InputKind::of(path)? == InputKind::Statistics {
            StatsFile::open(path)?;
            return Ok(path.into());
        }
        let select = Select::Tokens(max_tokens);
        let options = TextOptions { window, select, seed, ..TextOptions::default() };
        Ok(Tokens::from_text(source, path, &options)?.into())
    }
}

impl From<&Path> for Calibration {
    fn from(path: &Path) -> Self {
        Self::Statistics(path.into())
    }
}

impl From<&PathBuf> for Calibration {
    fn from(path: &PathBuf) -> Self {
        Self::Statistics(path.clone())
    }
}

impl From<PathBuf> for Calibration {
    fn from(path: PathBuf) -> Self {
        Self::Statistics(path)
    }
}

impl From<TextTokens> for Calibration {
    fn from(text: TextTokens) -> Self {
        Self::Read(text)
    }
}

impl From<Tokens> for Calibration {
    fn from(tokens: Tokens) -> Self {
        Self::Tokens(tokens)
    }
}

/// A calibration that is ready to be used.
#[derive(Debug, Clone, Copy)]
pub(crate) enum CalibrationData<'a> {
    /// An open file.
    Statistics(&'a StatsFile),
    /// Token ids.
    Tokens(&'a Tokens),
}
