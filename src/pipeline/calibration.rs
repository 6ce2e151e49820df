//! Where the statistics of a run come from.

use std::path::{Path, PathBuf};

use super::tokens::Tokens;
use crate::calibrate::StatsFile;

/// Where the statistics of a run come from: a file, or text that is run through the model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Calibration {
    /// A statistics file.
    Statistics(PathBuf),
    /// Token ids; at most 4096 tokens of each layer, spread evenly, are samples.
    Tokens(Tokens),
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

impl From<Tokens> for Calibration {
    fn from(tokens: Tokens) -> Self {
        Self::Tokens(tokens)
    }
}

/// A calibration that is ready to be used.
#[derive(Debug, Clone, Copy)]
pub(super) enum Given<'a> {
    /// An open file.
    Statistics(&'a StatsFile),
    /// Token ids.
    Tokens(&'a Tokens),
}
