//! Token ids to calibrate on, and how.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::calibrate::text::{Select, Text, TextOptions, TextRecord};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::model::Stack;
use crate::pipeline::activations::model::{EvalModel, Sequences};
use crate::stage::Context;

/// Token ids of calibration text, in windows that do not see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// Windows for a decoder-only model.
    Windows(Vec<Vec<u32>>),
    /// Input and targets of an encoder-decoder model. The decoder reads the targets shifted right
    /// behind the start token.
    Pairs(Vec<(Vec<u32>, Vec<u32>)>),
}

/// Token ids of a text, and the record of the files that they come from.
#[derive(Debug, Clone, PartialEq)]
pub struct TextTokens {
    /// The ids.
    pub tokens: Tokens,
    /// The files, how they were cut, and which windows were drawn.
    pub record: TextRecord,
}

impl From<Vec<Vec<u32>>> for Tokens {
    fn from(windows: Vec<Vec<u32>>) -> Self {
        Self::Windows(windows)
    }
}

impl From<Vec<(Vec<u32>, Vec<u32>)>> for Tokens {
    fn from(pairs: Vec<(Vec<u32>, Vec<u32>)>) -> Self {
        Self::Pairs(pairs)
    }
}

impl Tokens {
    /// Windows of a text file or a folder of them, drawn by `seed`, as many as fit in
    /// `max_tokens`; as the model wants them: encoder-decoder models get pairs, by T5's span
    /// corruption. `window: None` is 512 tokens (256 for pairs), or the model's context if that is
    /// less. See [`text`](crate::calibrate::text).
    ///
    /// # Errors
    /// Those of [`Text::read`]; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a
    /// family without a native forward pass.
    pub fn read(
        source: &Checkpoint,
        path: &Path,
        window: Option<usize>,
        max_tokens: usize,
        seed: u64,
    ) -> Result<Self> {
        let subject = EvalModel::open(source, &Context::cpu(seed))?;
        let select = Select::Tokens(max_tokens);
        let options = TextOptions { window, select, seed, ..TextOptions::default() };
        Ok(Self::recorded(&subject, path, &options)?.tokens)
    }

    /// Windows of a text with all options, and what was read.
    ///
    /// # Errors
    /// As [`Tokens::read`].
    pub fn from_text(
        source: &Checkpoint,
        path: &Path,
        options: &TextOptions,
    ) -> Result<TextTokens> {
        let subject = EvalModel::open(source, &Context::cpu(options.seed))?;
        Self::recorded(&subject, path, options)
    }

    /// Reads and cuts a text as the model wants it, and records what was read.
    pub(crate) fn recorded(
        subject: &EvalModel<'_>,
        path: &Path,
        options: &TextOptions,
    ) -> Result<TextTokens> {
        let text = Text::read(path, subject.checkpoint.dir(), subject.limits(), options)?;
        let tokens = match subject.items(&text, options.seed)? {
            Sequences::Causal(windows) => Self::Windows(windows),
            Sequences::Pairs(pairs) => Self::Pairs(pairs),
        };
        Ok(TextTokens { tokens, record: text.record().clone() })
    }

    /// Whether there is no window.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Windows(all) => all.is_empty(),
            Self::Pairs(all) => all.is_empty(),
        }
    }

    /// Number of tokens that a stack sees.
    pub fn of(&self, stack: Stack) -> u64 {
        let sum = |lengths: &mut dyn Iterator<Item = usize>| lengths.map(|n| n as u64).sum();
        match (self, stack) {
            (Self::Windows(all), _) => sum(&mut all.iter().map(Vec::len)),
            (Self::Pairs(all), Stack::Decoder) => sum(&mut all.iter().map(|(_, t)| t.len())),
            (Self::Pairs(all), _) => sum(&mut all.iter().map(|(i, _)| i.len())),
        }
    }

    /// Which windows, spread evenly over all, hold at most `most` tokens if all are of the mean
    /// length: ascending, at least one. `None` for all of them.
    pub(crate) fn spread(&self, most: usize) -> Option<Vec<usize>> {
        let rows = self.rows();
        let total: usize = rows.iter().sum();
        if total <= most {
            return None;
        }
        let (all, count) = (rows.len(), (rows.len() * most / total).max(1));
        Some((0..count).map(|i| (2 * i + 1) * all / (2 * count)).collect())
    }

    /// Some of the windows; `None`: all.
    pub(crate) fn only(&self, windows: Option<&[usize]>) -> Cow<'_, Self> {
        let Some(at) = windows else { return Cow::Borrowed(self) };
        Cow::Owned(match self {
            Self::Windows(all) => Self::Windows(at.iter().map(|&i| all[i].clone()).collect()),
            Self::Pairs(all) => Self::Pairs(at.iter().map(|&i| all[i].clone()).collect()),
        })
    }

    /// Tokens of each window, in the stack where it is longer.
    pub(crate) fn rows(&self) -> Vec<usize> {
        match self {
            Self::Windows(all) => all.iter().map(Vec::len).collect(),
            Self::Pairs(all) => all.iter().map(|(i, t)| i.len().max(t.len())).collect(),
        }
    }
}

/// Samples per layer unless asked for otherwise.
pub(crate) const SAMPLES: usize = 4096;

/// How text is run through a model.
#[derive(Debug, Clone)]
pub struct CalibrateOptions {
    /// Most samples per layer, spread evenly over the tokens.
    pub samples: usize,
    /// Bytes of hidden states of one stack that are held in memory; above, a scratch file is used.
    pub memory: u64,
    /// The folder of scratch files.
    pub scratch: PathBuf,
    /// The device.
    pub cx: Context,
}

impl Default for CalibrateOptions {
    /// 4096 samples, 2 GiB, the system's folder for temporary files, the CPU.
    fn default() -> Self {
        let (memory, scratch, cx) = (2 << 30, std::env::temp_dir(), Context::cpu(0));
        Self { samples: SAMPLES, memory, scratch, cx }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_evenly_and_at_least_one_stays() {
        let tokens = Tokens::from((0..10).map(|i| vec![i; 8]).collect::<Vec<_>>());
        assert_eq!(tokens.spread(80), None);
        assert_eq!(tokens.spread(79), Some(vec![0, 1, 2, 3, 5, 6, 7, 8, 9]));
        assert_eq!(tokens.spread(16), Some(vec![2, 7]));
        assert_eq!(tokens.spread(1), Some(vec![5]));
        assert_eq!(*tokens.only(Some(&[2, 7])), Tokens::from(vec![vec![2; 8], vec![7; 8]]));
        assert_eq!(*tokens.only(None), tokens);
        let pairs = Tokens::from(vec![(vec![1; 4], vec![2; 9]), (vec![3; 4], vec![4; 9])]);
        let last = pairs.spread(9);
        assert_eq!(*pairs.only(last.as_deref()), Tokens::from(vec![(vec![3; 4], vec![4; 9])]));
    }
}
