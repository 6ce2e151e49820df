//! What a file is when it is not what it should be, and what to do about it.

use std::fs;
use std::io;
use std::path::Path;

use crate::error::Error;

/// Bytes of a beginning that are shown.
const SHOWN: usize = 60;

/// What a file that begins like this is, with a remedy, if it is no safetensors file and no JSON
/// document; `None` when the beginning says nothing.
pub(crate) fn foreign(beginning: &[u8]) -> Option<String> {
    let is = |start: &[u8]| beginning.starts_with(start);
    let known = if beginning.is_empty() {
        "an empty file: download it again"
    } else if is(b"version https://git-lfs.github.com") {
        "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`, or download the file"
    } else if is(b"GGUF") {
        "a GGUF file (llama.cpp), which cannot be read: use the original checkpoint in safetensors"
    } else if is(b"PK\x03\x04") {
        "a zip archive, as torch.save writes (a pickle): save the model as safetensors"
    } else if is(b"\x80\x02") || is(b"\x80\x03") || is(b"\x80\x04") || is(b"\x80\x05") {
        "a Python pickle: save the model as safetensors"
    } else if is(b"\x1f\x8b") {
        "a gzip archive: unpack it"
    } else if is(b"\x89HDF") {
        "an HDF5 file: save the model as safetensors"
    } else {
        return page(beginning);
    };
    Some(known.to_owned())
}

/// A page of a web server instead of the file.
fn page(beginning: &[u8]) -> Option<String> {
    let text = shown(beginning)?;
    let lower = text.trim_start().to_ascii_lowercase();
    (lower.starts_with("<!doctype") || lower.starts_with("<html") || lower.starts_with("<?xml"))
        .then(|| format!("an HTML page, not the file: download it again; it begins `{text}`"))
}

/// As [`foreign`], for a file whose first 8 bytes are no header length: text of any kind too.
pub(crate) fn not_tensors(beginning: &[u8]) -> Option<String> {
    foreign(beginning).or_else(|| {
        let text = shown(beginning)?;
        let kind = if text.trim_start().starts_with(['{', '[']) { "JSON text" } else { "text" };
        Some(format!("{kind}, not a safetensors file: download it again; it begins `{text}`"))
    })
}

/// The error of a JSON document that cannot be parsed: what it is instead, else where it fails.
pub(crate) fn not_json(format: &'static str, text: &[u8], error: &serde_json::Error) -> Error {
    match foreign(text) {
        Some(found) => Error::malformed(format, format!("it is {found}")),
        None => Error::malformed(format, error),
    }
}

/// The printable beginning of a file, on one line; `None` for binary data.
fn shown(beginning: &[u8]) -> Option<String> {
    let part = &beginning[..beginning.len().min(SHOWN)];
    let text = match std::str::from_utf8(part) {
        Ok(text) => text,
        // The cut may fall into a character.
        Err(e) if e.valid_up_to() + 4 > part.len() => {
            std::str::from_utf8(&part[..e.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let printable = |c: char| !c.is_control() || c.is_ascii_whitespace();
    (!text.is_empty() && text.chars().all(printable))
        .then(|| text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// An error of opening a file: one that is a link to nothing is named with its target.
pub(crate) fn open_error(operation: &'static str, path: &Path, error: io::Error) -> Error {
    match dangling(path) {
        Some(reason) => Error::io(operation, io::Error::new(io::ErrorKind::NotFound, reason)),
        None => Error::io(operation, error),
    }
}

/// What to say of a link whose target does not exist; `None` for anything else.
pub(crate) fn dangling(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    if path.exists() {
        return None;
    }
    Some(format!("it is a link to {}, which does not exist", target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_file_are_told_apart_by_their_beginning() {
        for (beginning, expected) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:44", "git-LFS pointer"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"PK\x03\x04\0\0", "torch.save"),
            (b"\x80\x02}q\0", "pickle"),
            (b"  <!DOCTYPE html><html>", "HTML page"),
            (b"{\"error\": \"Repository not found\"}", "JSON text"),
            (b"Not Found", "begins `Not Found`"),
        ] {
            let found = not_tensors(beginning).unwrap();
            assert!(found.contains(expected), "{found}");
        }
        assert_eq!(not_tensors(b"\xff\x01\0\0\0\0\0\0binary"), None);
        assert_eq!(foreign(b"{\"a\": 1}"), None);
    }

    #[test]
    #[cfg(unix)]
    fn links_to_nothing_are_named_with_their_target() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("config.json");
        std::os::unix::fs::symlink("../../blobs/0000", &link).unwrap();
        assert!(dangling(&link).unwrap().contains("../../blobs/0000"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(dangling(&dir.path().join("file")), None);
        assert_eq!(dangling(&dir.path().join("absent")), None);
    }
}
