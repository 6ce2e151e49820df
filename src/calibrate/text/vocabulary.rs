//! The checkpoint's own tokenizer, and what of it needs no tokenizer.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::source::{bytes, malformed};
use crate::error::{Error, Locate, Result};

const FILE: &str = "tokenizer.json";

/// The `tokenizer.json` of a checkpoint.
#[derive(Debug)]
pub struct Vocabulary {
    path: PathBuf,
    sha256: String,
    #[cfg(not(feature = "text"))]
    added: Vec<Added>,
    #[cfg(feature = "text")]
    tokenizer: tokenizers::Tokenizer,
}

/// A token beside the model's own vocabulary.
#[derive(Debug, Deserialize)]
struct Added {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

/// The ids of the sentinels `<extra_id_0>`, `<extra_id_1>`, … of span corruption, from the
/// `tokenizer.json` of a checkpoint's folder. Needs no feature.
///
/// # Errors
/// [`Io`](crate::ErrorKind::Io) when there is none, [`Format`](crate::ErrorKind::Format) when it
/// cannot be parsed or has no sentinels; all name it.
pub fn sentinels(folder: &Path) -> Result<Vec<u32>> {
    let path = folder.join(FILE);
    let read = || {
        let added = outline(&bytes(&path)?.0)?.added_tokens;
        let id = |i: usize| {
            let name = format!("<extra_id_{i}>");
            added.iter().find(|token| token.content == name).map(|token| token.id)
        };
        let found: Vec<u32> = (0..).map_while(id).collect();
        if found.is_empty() {
            return Err(malformed(FILE, "no sentinel <extra_id_0>".into()));
        }
        Ok(found)
    };
    read().in_file(&path)
}

fn outline(bytes: &[u8]) -> Result<Outline> {
    serde_json::from_slice(bytes).map_err(|e| malformed(FILE, e.to_string()))
}

impl Vocabulary {
    /// Reads the `tokenizer.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when there is none, [`Format`](crate::ErrorKind::Format) when
    /// it cannot be parsed; both name it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let read = || {
            let (bytes, sha256) = bytes(&path)?;
            Ok(Self {
                path: path.clone(),
                sha256,
                #[cfg(not(feature = "text"))]
                added: outline(&bytes)?.added_tokens,
                #[cfg(feature = "text")]
                tokenizer: tokenizers::Tokenizer::from_bytes(&bytes)
                    .map_err(|e| malformed(FILE, e.to_string()))?,
            })
        };
        read().in_file(&path)
    }

    /// SHA-256 of the file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Fails when a token has no row in an embedding of `vocab` rows.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) with the file.
    pub fn check(&self, vocab: usize) -> Result<()> {
        match self.largest().filter(|&id| id as usize >= vocab) {
            None => Ok(()),
            Some(id) => {
                let expected = format!("below the model's vocabulary of {vocab}");
                Err(Error::range("largest token id of the tokenizer", expected, id))
                    .in_file(&self.path)
            }
        }
    }
}

#[cfg(feature = "text")]
impl Vocabulary {
    fn largest(&self) -> Option<u32> {
        self.tokenizer.get_vocab(true).into_values().max()
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) with the file, when the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|e| malformed(FILE, e.to_string())).in_file(&self.path)?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) with the file, when the tokenizer refuses.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode(tokens, false);
        text.map_err(|e| malformed(FILE, e.to_string())).in_file(&self.path)
    }
}

#[cfg(not(feature = "text"))]
impl Vocabulary {
    fn largest(&self) -> Option<u32> {
        self.added.iter().map(|token| token.id).max()
    }

    /// Without the feature `text` there is no tokenizer.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    pub fn encode(&self, _: &str) -> Result<Vec<u32>> {
        Err(without_tokenizer())
    }

    /// Without the feature `text` there is no tokenizer.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    pub fn decode(&self, _: &[u32]) -> Result<String> {
        Err(without_tokenizer())
    }
}

#[cfg(not(feature = "text"))]
fn without_tokenizer() -> Error {
    let (what, found) = ("text", "this build lacks the feature `text`".into());
    let supported = "safetensors files of token ids".into();
    crate::error::ErrorKind::Unsupported { what, found, supported }.into()
}
