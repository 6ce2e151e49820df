//! On what a run was calibrated, by name and hash.

use serde::{Deserialize, Serialize};

use crate::calibrate::text::TextRecord;

/// The key of a statistics file's metadata that holds the [`TextRecord`] as JSON.
pub(crate) const TEXT_KEY: &str = "text";

/// A file by name and hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// Its name, without the folder.
    pub name: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// What the statistics of a run come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// The statistics file, if the run was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<HashedFile>,
    /// The text, also that of a statistics file that tells it. `None` for token ids from a program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextRecord>,
}
