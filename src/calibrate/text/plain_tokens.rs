//! Which token ids stand for text.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::read::malformed;
use crate::error::{Error, Locate, Result};

const FILE: &str = "tokenizer.json";

/// What is read of a `tokenizer.json`.
#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: Vocabulary,
}

#[derive(Deserialize)]
struct Vocabulary {
    /// Token to id, or a list of tokens in the order of their ids.
    #[serde(default)]
    vocab: Value,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(default)]
    special: bool,
}

/// For each id below `vocab` whether it stands for text: it is in the `tokenizer.json` of a
/// checkpoint's folder, and is no special token there and none of `special`. Without that file
/// every id but those of `special` does. Needs no feature.
///
/// # Errors
/// [`Io`](crate::ErrorKind::Io) when the file is there and cannot be read,
/// [`Format`](crate::ErrorKind::Format) when it cannot be parsed; both name it.
pub fn plain_tokens(folder: &Path, vocab: usize, special: &[u32]) -> Result<Vec<bool>> {
    let path = folder.join(FILE);
    let mut plain = match path.exists() {
        true => known(&path, vocab).in_file(&path)?,
        false => vec![true; vocab],
    };
    for &id in special {
        set(&mut plain, u64::from(id), false);
    }
    Ok(plain)
}

fn known(path: &Path, vocab: usize) -> Result<Vec<bool>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", e))?;
    let tokenizer: Tokenizer =
        serde_json::from_slice(&bytes).map_err(|e| malformed(FILE, e.to_string()))?;
    let mut plain = vec![false; vocab];
    match &tokenizer.model.vocab {
        Value::Object(ids) => {
            ids.values().filter_map(Value::as_u64).for_each(|id| set(&mut plain, id, true));
        }
        Value::Array(tokens) => {
            (0..tokens.len() as u64).for_each(|id| set(&mut plain, id, true));
        }
        _ => return Err(malformed(FILE, "no `model.vocab`")),
    }
    for token in &tokenizer.added_tokens {
        set(&mut plain, u64::from(token.id), !token.special);
    }
    Ok(plain)
}

fn set(plain: &mut [bool], id: u64, value: bool) {
    if let Some(flag) = usize::try_from(id).ok().and_then(|id| plain.get_mut(id)) {
        *flag = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tokenizer: Option<&str>, special: &[u32]) -> Result<Vec<bool>> {
        let dir = tempfile::tempdir().unwrap();
        if let Some(text) = tokenizer {
            std::fs::write(dir.path().join(FILE), text).unwrap();
        }
        plain_tokens(dir.path(), 6, special)
    }

    #[test]
    fn special_and_unknown_ids_do_not_stand_for_text() {
        let added = r#""added_tokens": [{"id": 0, "content": "<s>", "special": true},
            {"id": 4, "content": "<think>", "special": false}]"#;
        let pairs = format!(r#"{{{added}, "model": {{"vocab": {{"<s>": 0, "a": 1, "b": 2}}}}}}"#);
        let list =
            format!(r#"{{{added}, "model": {{"vocab": [["<s>", 0.0], ["a", 1], ["b", 2]]}}}}"#);
        for tokenizer in [pairs, list] {
            let plain = of(Some(&tokenizer), &[2, 99]).unwrap();
            assert_eq!(plain, [false, true, false, false, true, false]);
        }
        assert_eq!(of(None, &[0]).unwrap(), [false, true, true, true, true, true]);
        assert!(of(Some("{"), &[]).unwrap_err().to_string().contains(FILE));
        let none = of(Some(r#"{"model": {}}"#), &[]).unwrap_err();
        assert!(none.to_string().contains("model.vocab"));
    }
}
