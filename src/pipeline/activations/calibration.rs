//! Where the statistics of a run come from.

use std::borrow::Cow;
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
    /// Whatever lies there: a statistics file, token ids, a text file or a folder of them, told
    /// apart by content. Text is cut as [`Calibration::text_options`] says.
    Path(PathBuf),
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

    /// How text is read where nothing else is asked for: 16,384 tokens in windows of 512 (256 for
    /// encoder-decoder models, or the model's context if that is less), drawn with seed 7.
    pub fn text_options() -> TextOptions {
        TextOptions { select: Select::Tokens(16_384), seed: 7, ..TextOptions::default() }
    }

    /// The same, with a path replaced by what lies there.
    pub(crate) fn resolved(&self) -> Result<Cow<'_, Self>> {
        let Self::Path(path) = self else { return Ok(Cow::Borrowed(self)) };
        let path = path.clone();
        Ok(Cow::Owned(match InputKind::of(&path)? {
            InputKind::Statistics => Self::Statistics(path),
            _ => Self::Text { path, options: Self::text_options() },
        }))
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
            return Ok(Self::Statistics(path.into()));
        }
        let select = Select::Tokens(max_tokens);
        let options = TextOptions { window, select, seed, ..TextOptions::default() };
        Ok(Tokens::from_text(source, path, &options)?.into())
    }
}

impl From<&Path> for Calibration {
    fn from(path: &Path) -> Self {
        Self::Path(path.into())
    }
}

impl From<&PathBuf> for Calibration {
    fn from(path: &PathBuf) -> Self {
        Self::Path(path.clone())
    }
}

impl From<PathBuf> for Calibration {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&str> for Calibration {
    fn from(path: &str) -> Self {
        Self::Path(path.into())
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
