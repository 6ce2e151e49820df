//! The format of a file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};

/// What a text file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::calibrate::text) enum Format {
    /// Text as it is: one document.
    Plain,
    /// JSON values one behind the other, or a list of them: a document each.
    Json,
    /// Token ids.
    Ids,
}

const ENDINGS: [(&str, Format); 5] = [
    ("txt", Format::Plain),
    ("jsonl", Format::Json),
    ("ndjson", Format::Json),
    ("json", Format::Json),
    ("safetensors", Format::Ids),
];

/// Endings of compressed text, which follow another ending. Whether a file is compressed is told
/// by its first bytes.
const COMPRESSED: [&str; 3] = ["gz", "zst", "zstd"];

pub(super) const SUPPORTED: &str =
    ".txt, .jsonl, .json, these with .gz or .zst behind, .safetensors (token ids)";

impl Format {
    /// The format that a file's name tells; `None` for a file that is no text.
    pub(super) fn of_name(path: &Path) -> Option<Self> {
        let ending = |path: &Path| Some(path.extension()?.to_str()?.to_ascii_lowercase());
        let mut last = ending(path)?;
        if COMPRESSED.contains(&&*last) {
            last = ending(Path::new(path.file_stem()?))?;
        }
        ENDINGS.iter().find(|(known, _)| *known == last).map(|(_, format)| *format)
    }

    /// The format of a file that was named as text.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another ending, with what to do for Parquet.
    pub(super) fn of(path: &Path) -> Result<Self> {
        if let Some(format) = Self::of_name(path) {
            return Ok(format);
        }
        let ending = path.extension().map(|e| e.to_string_lossy().into_owned());
        let (found, supported) = match ending.as_deref() {
            Some("parquet") => (
                "Parquet".into(),
                format!(
                    "{SUPPORTED}; with pandas, read_parquet(FILE).to_json(\"text.jsonl\", \
                     orient=\"records\", lines=True) writes its rows as .jsonl"
                ),
            ),
            Some(other) => (other.into(), SUPPORTED.into()),
            None => ("no ending".into(), SUPPORTED.into()),
        };
        Err(ErrorKind::Unsupported { what: "text file", found, supported }.into())
    }
}

/// SHA-256 of a file's bytes, in hexadecimal.
pub(in crate::calibrate::text) fn sha256(path: &Path) -> Result<String> {
    let io = |e| Error::io("read", e);
    let mut file = File::open(path).map_err(io)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_format_and_others_are_refused_with_what_would_do() {
        let of = |name: &str| Format::of(Path::new(name));
        assert_eq!(of("a.b/c.TXT").unwrap(), Format::Plain);
        assert_eq!(of("a.jsonl.zst").unwrap(), Format::Json);
        assert_eq!(of("ids.safetensors").unwrap(), Format::Ids);
        for (name, says) in [
            ("a.pdf", "pdf"),
            ("README", "no ending"),
            ("a.gz", "gz"),
            ("train-00000.parquet", "to_json"),
        ] {
            let error = of(name).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(".jsonl"), "{error}");
        }
    }
}
