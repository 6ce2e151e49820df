//! The checkpoint's own tokenizer, and what of it needs no tokenizer.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::options::{Separator, SpecialTokens};
use super::read::{malformed, sha256};
use super::windows::Special;
use crate::error::{Error, ErrorKind, Locate, Result};

const FILE: &str = "tokenizer.json";
/// Files of tokenizers that this crate does not read.
const OTHERS: [&str; 5] =
    ["tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "spiece.model"];

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
struct TokenizerFile {
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
        let added = tokenizer_file(&bytes(&path)?)?.added_tokens;
        let id = |i: usize| {
            let name = format!("<extra_id_{i}>");
            added.iter().find(|token| token.content == name).map(|token| token.id)
        };
        let found: Vec<u32> = (0..).map_while(id).collect();
        if found.is_empty() {
            return Err(malformed(FILE, "no sentinel <extra_id_0>"));
        }
        Ok(found)
    };
    read().in_file(&path)
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io("read", e))
}

fn tokenizer_file(bytes: &[u8]) -> Result<TokenizerFile> {
    serde_json::from_slice(bytes).map_err(|e| malformed(FILE, e.to_string()))
}

impl Vocabulary {
    /// Reads the `tokenizer.json` of a checkpoint's folder. Truncation and padding that it holds
    /// are ignored, as `AutoTokenizer` does: they belong to the batches of a training run.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) when there is none, with how to make one;
    /// [`Io`](crate::ErrorKind::Io); [`Format`](crate::ErrorKind::Format) when it cannot be parsed;
    /// all name it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let read = || {
            if !path.exists() {
                return Err(missing(folder));
            }
            Ok(Self {
                path: path.clone(),
                sha256: sha256(&path)?,
                #[cfg(not(feature = "text"))]
                added: tokenizer_file(&bytes(&path)?)?.added_tokens,
                #[cfg(feature = "text")]
                tokenizer: tokenizer(&bytes(&path)?)?,
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
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) with the file and the token.
    pub fn check(&self, tokens: &[u32], vocab: usize) -> Result<()> {
        match tokens.iter().find(|&&id| id as usize >= vocab) {
            None => Ok(()),
            Some(&id) => Err(self.beyond(id, vocab)).in_file(&self.path),
        }
    }

    /// Tokens that end a continuation, as `generation_config.json` says beside the config.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) and [`Format`](crate::ErrorKind::Format) with the file.
    pub fn ends(&self) -> Result<Vec<u32>> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let value = json(&folder.join("generation_config.json"))?["eos_token_id"].take();
        let ids = match value {
            Value::Array(ids) => ids,
            other => vec![other],
        };
        Ok(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect())
    }

    /// A token that the model has no row for.
    pub(super) fn beyond(&self, id: u32, vocab: usize) -> Error {
        let expected = format!("below the model's vocabulary of {vocab}");
        let name = self.token(id).unwrap_or_default();
        Error::range(format!("id of the token `{name}` in the text"), expected, id)
    }

    /// What is put between documents and before windows.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a token that is not in the vocabulary, or
    /// when the model names no BOS that is asked for; those of the tokenizer.
    pub(super) fn special(&self, tokens: SpecialTokens, separator: &Separator) -> Result<Special> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let known = |name: &str| {
            let unknown = || Error::range("special token", "one of the vocabulary", name);
            self.id(name).ok_or_else(unknown).in_file(&self.path)
        };
        let (before, behind) = self.around()?;
        let prefix = match tokens {
            SpecialTokens::Tokenizer => before,
            SpecialTokens::None => Vec::new(),
            SpecialTokens::Bos => match named(folder, "bos_token")? {
                Some(name) => vec![known(&name)?],
                None => vec![self.configured(folder, "bos_token_id")?.ok_or_else(|| {
                    let expected = "`bos_token` in tokenizer_config.json, or `bos_token_id` in \
                                    config.json";
                    Error::range("BOS", expected, "neither")
                })?],
            },
        };
        let separator = match separator {
            Separator::None => None,
            Separator::Token(name) => Some(known(name)?),
            // A tokenizer that ends every text by a token was trained with that.
            Separator::Eos => match behind.last() {
                Some(&id) => Some(id),
                None => match self.configured(folder, "eos_token_id")? {
                    Some(id) => Some(id),
                    None => named(folder, "eos_token")?.and_then(|name| self.id(&name)),
                },
            },
        };
        Ok(Special { prefix, separator })
    }

    /// A token id of the model's config; of several the first, which is the end of a document.
    fn configured(&self, folder: &Path, key: &str) -> Result<Option<u32>> {
        let config = json(&folder.join("config.json"))?;
        let value = [&config, &config["text_config"]].map(|object| &object[key]);
        let first = |value: &Value| match value {
            Value::Array(ids) => ids.first().and_then(Value::as_u64),
            other => other.as_u64(),
        };
        Ok(value.into_iter().find_map(first).and_then(|id| u32::try_from(id).ok()))
    }
}

/// A special token of `tokenizer_config.json` by its role.
fn named(folder: &Path, role: &str) -> Result<Option<String>> {
    let config = json(&folder.join("tokenizer_config.json"))?;
    let token = &config[role];
    Ok(token.as_str().or(token["content"].as_str()).map(str::to_owned))
}

/// JSON in a file; null when there is no file.
fn json(file: &Path) -> Result<Value> {
    if !file.exists() {
        return Ok(Value::Null);
    }
    let parse = |bytes: Vec<u8>| {
        serde_json::from_slice(&bytes).map_err(|e| malformed("JSON", e.to_string()))
    };
    bytes(file).and_then(parse).in_file(file)
}

/// There is no `tokenizer.json`.
fn missing(folder: &Path) -> Error {
    let others: Vec<&str> = OTHERS.into_iter().filter(|name| folder.join(name).exists()).collect();
    let found = match others.is_empty() {
        true => "no tokenizer.json".into(),
        false => format!("{} without tokenizer.json", others.join(", ")),
    };
    let model = folder.display();
    let supported = format!(
        "tokenizer.json, which AutoTokenizer.from_pretrained(\"{model}\").save_pretrained(\
         \"{model}\") of transformers writes; or token ids in a .safetensors file in place of text"
    );
    ErrorKind::Unsupported { what: "tokenizer", found, supported }.into()
}

#[cfg(feature = "text")]
fn tokenizer(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let parsed = tokenizers::Tokenizer::from_bytes(bytes);
    let mut tokenizer = parsed.map_err(|e| malformed(FILE, e.to_string()))?;
    let plain = tokenizer.with_padding(None).with_truncation(None);
    plain.map_err(|e| malformed(FILE, e.to_string()))?;
    Ok(tokenizer)
}

#[cfg(feature = "text")]
impl Vocabulary {
    fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// What the post-processor puts before and behind a text.
    fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let plain = self.encode("a")?;
        let full = self.encoded("a", true)?;
        let at = full.windows(plain.len().max(1)).position(|part| part == plain);
        let Some(at) = at else { return Ok((Vec::new(), Vec::new())) };
        Ok((full[..at].to_vec(), full[at + plain.len()..].to_vec()))
    }

    /// The tokens of a text, between those that the post-processor puts around it.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, true)
    }

    fn encoded(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoded = self.tokenizer.encode_fast(text, special);
        let encoded = encoded.map_err(|e| malformed(FILE, e.to_string())).in_file(&self.path)?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) with the file, when the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, false)
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
    fn token(&self, id: u32) -> Option<String> {
        self.added.iter().find(|token| token.id == id).map(|token| token.content.clone())
    }

    fn id(&self, content: &str) -> Option<u32> {
        self.added.iter().find(|token| token.content == content).map(|token| token.id)
    }

    fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        Err(without_tokenizer())
    }

    /// Without the feature `text` there is no tokenizer.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    pub fn encode_whole(&self, _: &str) -> Result<Vec<u32>> {
        Err(without_tokenizer())
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
pub(super) fn without_tokenizer() -> Error {
    let (what, found) = ("text", "this build lacks the feature `text`".into());
    let supported = "safetensors files of token ids".into();
    ErrorKind::Unsupported { what, found, supported }.into()
}
