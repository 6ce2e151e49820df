//! What a result was computed on.

use serde::{Deserialize, Serialize};

use super::options::{OwnTextOptions, Select, TextOptions};

/// One file of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name; of a file in a folder its path from there.
    pub name: String,
    /// The source that it is a part of.
    #[serde(default)]
    pub source: String,
    /// SHA-256 of its bytes on the disk, in hexadecimal.
    pub sha256: String,
    /// Documents in it.
    #[serde(default)]
    pub documents: u64,
    /// Documents without any text.
    #[serde(default)]
    pub empty: u64,
    /// Tokens in the whole file; of a sampled one ([`SourceRecord::sampled`]) in the sample.
    pub tokens: u64,
    /// Windows that are used and begin in it.
    pub windows: u64,
}

/// One source of a text: a file, or a folder of files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The file's name without its ending, or the folder's name.
    pub name: String,
    /// Windows that it could give.
    pub available: u64,
    /// Windows that are used.
    pub windows: u64,
    /// Tokens in these windows.
    pub tokens: u64,
    /// Tokens at the end of it that are less than a window, and are not used.
    pub left_over: u64,
    /// Of a source that is too long to be tokenised whole: bytes of the sample that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampled: Option<u64>,
}

/// A chat template that was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// The file that holds it.
    pub file: String,
    /// SHA-256 of the template's text, in hexadecimal.
    pub sha256: String,
}

/// What text was used, small enough to be kept with every result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextRecord {
    /// The files, in order.
    pub files: Vec<FileRecord>,
    /// The sources, in order.
    #[serde(default)]
    pub sources: Vec<SourceRecord>,
    /// SHA-256 of the `tokenizer.json`; `None` when every file holds token ids.
    pub tokenizer_sha256: Option<String>,
    /// The chat template, if there were conversations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateRecord>,
    /// Special tokens that begin every window.
    #[serde(default)]
    pub prefix: Vec<u32>,
    /// The token between two documents.
    #[serde(default)]
    pub separator: Option<u32>,
    /// How the text was cut and chosen.
    pub options: TextOptions,
    /// Windows in all.
    pub windows: u64,
    /// Tokens in these windows.
    pub tokens: u64,
    /// Padded positions of token ids, which are no tokens.
    #[serde(default)]
    pub padding: u64,
    /// Files in the folder that are of another kind, and were not read.
    #[serde(default)]
    pub not_read: Vec<String>,
    /// Text that the model wrote itself, which follows the windows of the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_text: Option<OwnTextOptions>,
}

impl TextRecord {
    /// Adds so many windows, of so many tokens in all, that the model wrote: a source of their own.
    pub(crate) fn add_own_text(&mut self, options: &OwnTextOptions, windows: u64, tokens: u64) {
        let name = "own text".into();
        let (available, left_over, sampled) = (windows, 0, None);
        self.sources.push(SourceRecord { name, available, windows, tokens, left_over, sampled });
        self.windows += windows;
        self.tokens += tokens;
        self.own_text = Some(options.clone());
    }
}

impl TextRecord {
    /// What a user should know of it: fewer tokens than asked for, sources that gave nothing or
    /// less than their share, documents and files that were not used.
    pub fn warnings(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let (Select::Tokens(asked), Some(window)) = (self.options.select, self.options.window)
            && self.tokens < (asked - asked % window.max(1)) as u64
        {
            found.push(format!(
                "{asked} tokens asked for, {} used: the text has no more windows of {window} \
                 tokens",
                self.tokens
            ));
        }
        found.extend(self.sources.iter().filter_map(|source| self.of_source(source)));
        let empty: u64 = self.files.iter().map(|file| file.empty).sum();
        if empty > 0 {
            found.push(format!("{empty} documents are empty"));
        }
        if !self.not_read.is_empty() {
            let (count, names) = (self.not_read.len(), &self.not_read);
            let names = names[..count.min(3)].join(", ");
            found.push(format!("{count} files of another kind are not read: {names}"));
        }
        found
    }

    fn of_source(&self, source: &SourceRecord) -> Option<String> {
        let SourceRecord { name, available, windows, left_over, .. } = source;
        if *available == 0 {
            return Some(format!("{name}: {left_over} tokens are less than a window; not used"));
        }
        let share = |(of, share): &(String, f64)| (of == name).then_some(*share);
        let total: f64 = self.options.mix.iter().map(|(_, share)| share).sum();
        let asked = self.options.mix.iter().find_map(share)? / total;
        let found = *windows as f64 / self.windows.max(1) as f64;
        ((asked - found).abs() > 0.05 && available == windows).then(|| {
            let (asked, found) = (100.0 * asked, 100.0 * found);
            format!("{name}: share of {asked:.0}% asked for, {found:.0}% of the windows used")
        })
    }
}
