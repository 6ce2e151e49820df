//! What a result was computed on.

use serde::{Deserialize, Serialize};

use super::select::TextOptions;

/// One file of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name, without the folder.
    pub name: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// Tokens in the whole file.
    pub tokens: u64,
    /// Windows of it that are used.
    pub windows: u64,
}

/// What text was used, small enough to be kept beside every result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextRecord {
    /// The files, in order.
    pub files: Vec<FileRecord>,
    /// SHA-256 of the `tokenizer.json`; `None` when every file holds token ids.
    pub tokenizer_sha256: Option<String>,
    /// How the text was cut and chosen.
    pub options: TextOptions,
    /// Windows in all.
    pub windows: u64,
    /// Tokens in these windows.
    pub tokens: u64,
}
