//! The files of a text, and what they hold.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Locate, Result};

/// The kinds of file, by their ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Lines,
    Ids,
}

const ENDINGS: [(&str, Kind); 3] =
    [("txt", Kind::Plain), ("jsonl", Kind::Lines), ("safetensors", Kind::Ids)];

/// The kind of a file.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for another ending.
pub(super) fn kind(path: &Path) -> Result<Kind> {
    known(path).ok_or_else(|| {
        let found = path.extension().map_or("no ending".into(), |e| e.to_string_lossy().into());
        let supported = ".txt, .jsonl, .safetensors (token ids)".into();
        ErrorKind::Unsupported { what: "text file", found, supported }.into()
    })
}

fn known(path: &Path) -> Option<Kind> {
    let ending = path.extension()?.to_str()?;
    ENDINGS.iter().find(|(known, _)| *known == ending).map(|(_, kind)| *kind)
}

/// The file itself, or the text files of a folder in order of their names.
///
/// # Errors
/// [`ErrorKind::Io`]; [`ErrorKind::Unsupported`] for a file of another kind or a folder without
/// text files.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let list = || {
        let io = |e| Error::io("read text", e);
        if !std::fs::metadata(path).map_err(io)?.is_dir() {
            kind(path)?;
            return Ok(vec![path.to_owned()]);
        }
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).map_err(io)? {
            let file = entry.map_err(io)?.path();
            if known(&file).is_some() && file.is_file() {
                files.push(file);
            }
        }
        if files.is_empty() {
            let supported = "at least one .txt, .jsonl or .safetensors file".into();
            let found = "a folder without any".into();
            return Err(ErrorKind::Unsupported { what: "text", found, supported }.into());
        }
        files.sort();
        Ok(files)
    };
    list().in_file(path)
}

/// A file's bytes and their SHA-256.
pub(super) fn bytes(path: &Path) -> Result<(Vec<u8>, String)> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", e))?;
    let hash = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    Ok((bytes, hash))
}

/// The documents of a text file: one, or one a line.
///
/// # Errors
/// [`ErrorKind::Format`] with the offset of the first byte that is not UTF-8, or with the line that
/// is no object with a `text`.
pub(super) fn documents(kind: Kind, bytes: &[u8]) -> Result<Vec<String>> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        malformed("UTF-8 text", format!("invalid byte at offset {}", e.valid_up_to()))
    })?;
    if kind == Kind::Plain {
        return Ok(vec![text.to_owned()]);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let document = |(n, line): (usize, &str)| match serde_json::from_str::<Document>(line) {
        Ok(document) => Ok(document.text),
        Err(e) => Err(malformed("JSON lines", format!("line {}: {e}", n + 1))),
    };
    lines.map(document).collect()
}

#[derive(Deserialize)]
struct Document {
    text: String,
}

pub(super) fn malformed(format: &'static str, reason: String) -> Error {
    ErrorKind::Format { format, reason }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_lines_of_json_or_whole_files() {
        let lines = b"{\"text\": \"a\\nb\", \"id\": 1}\n\n{\"text\": \"\"}\n";
        assert_eq!(documents(Kind::Lines, lines).unwrap(), ["a\nb", ""]);
        assert_eq!(documents(Kind::Plain, lines).unwrap().len(), 1);
        let error = documents(Kind::Lines, b"{\"text\": \"\"}\n{\"txt\": \"\"}").unwrap_err();
        assert!(error.to_string().contains("line 2: missing field `text`"), "{error}");
        let error = documents(Kind::Plain, b"ab\xff").unwrap_err().to_string();
        assert!(error.contains("invalid byte at offset 2"), "{error}");
    }

    #[test]
    fn other_endings_are_refused() {
        let error = kind(Path::new("a.pdf")).unwrap_err().to_string();
        assert!(error.contains("pdf") && error.contains(".jsonl"), "{error}");
        assert!(kind(Path::new("README")).is_err());
    }
}
