//! From files to windows.

use std::path::Path;

use super::ids::{self, Ids};
use super::record::{FileRecord, TextRecord};
use super::select::{TextOptions, choose};
use super::source::{self, Kind};
use super::vocabulary::Vocabulary;
use crate::error::{Error, Locate, Result};

/// What the model can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Number of token ids.
    pub vocab: usize,
    /// Longest window, in tokens.
    pub longest: usize,
}

/// The windows of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFile {
    /// The file's name without its ending.
    pub name: String,
    /// Token ids.
    pub windows: Vec<Vec<u32>>,
}

/// Windows of token ids, by file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    files: Vec<TextFile>,
    record: TextRecord,
}

impl Text {
    /// Reads a file or a folder of files, tokenised by the `tokenizer.json` in `model`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a window that is empty or longer
    /// than the model allows, a file that is shorter than a window, a token id (or a tokenizer with
    /// one) outside the model's vocabulary; [`ErrorKind::Io`](crate::ErrorKind::Io) for a missing
    /// file, also the `tokenizer.json`; [`ErrorKind::Format`](crate::ErrorKind::Format) for a
    /// damaged one; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a file of another
    /// kind, and for text in a build without the feature `text`. Each names the file.
    pub fn read(path: &Path, model: &Path, limits: Limits, options: &TextOptions) -> Result<Self> {
        if options.window == 0 || options.window > limits.longest {
            let expected = format!("1 to {} tokens (the model's context)", limits.longest);
            return Err(Error::range("window", expected, options.window));
        }
        let paths = source::files(path)?;
        let mut vocabulary = None;
        if paths.iter().any(|path| source::kind(path).is_ok_and(|kind| kind != Kind::Ids)) {
            let opened = Vocabulary::open(model)?;
            opened.check(limits.vocab)?;
            vocabulary = Some(opened);
        }
        let (mut windows, mut records) = (Vec::new(), Vec::new());
        for path in &paths {
            let (record, cut) = file(path, limits, options, vocabulary.as_ref()).in_file(path)?;
            records.push(record);
            windows.push(cut);
        }
        choose(&mut windows, options);
        for (record, windows) in records.iter_mut().zip(&windows) {
            record.windows = windows.len() as u64;
        }
        let record = TextRecord {
            tokenizer_sha256: vocabulary.map(|v| v.sha256().to_owned()),
            options: *options,
            windows: windows.iter().map(|w| w.len() as u64).sum(),
            tokens: windows.iter().flatten().map(|w| w.len() as u64).sum(),
            files: records,
        };
        let name =
            |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let files = paths.iter().map(|path| name(path)).zip(windows);
        let files = files.map(|(name, windows)| TextFile { name, windows }).collect();
        Ok(Self { files, record })
    }

    /// The files, in order.
    pub fn files(&self) -> &[TextFile] {
        &self.files
    }

    /// All windows, in order of the files.
    pub fn windows(&self) -> impl Iterator<Item = &[u32]> {
        self.files.iter().flat_map(|file| &file.windows).map(Vec::as_slice)
    }

    /// What was read and chosen.
    pub fn record(&self) -> &TextRecord {
        &self.record
    }
}

/// All windows of a file.
fn file(
    path: &Path,
    limits: Limits,
    options: &TextOptions,
    vocabulary: Option<&Vocabulary>,
) -> Result<(FileRecord, Vec<Vec<u32>>)> {
    let kind = source::kind(path)?;
    let (bytes, sha256) = source::bytes(path)?;
    let ids = match (kind, vocabulary) {
        (Kind::Plain | Kind::Lines, Some(vocabulary)) => {
            let documents = source::documents(kind, &bytes)?;
            let encode = |text: &String| vocabulary.encode(text);
            let encoded = documents.iter().map(encode).collect::<Result<Vec<_>>>()?;
            Ids::Text(encoded.concat())
        }
        _ => ids::read(&bytes)?,
    };
    let (tokens, windows) = match ids {
        Ids::Text(ids) => {
            let windows = ids.chunks_exact(options.window).map(<[u32]>::to_vec).collect();
            (ids.len(), windows)
        }
        Ids::Windows(windows) => (windows.iter().map(Vec::len).sum(), windows),
    };
    if windows.is_empty() {
        let expected = format!("at least one window of {} tokens", options.window);
        return Err(Error::range("text", expected, format!("{tokens} tokens")));
    }
    for (w, window) in windows.iter().enumerate() {
        if window.len() > options.window {
            let expected = format!("windows of at most {} tokens", options.window);
            return Err(Error::range("token ids", expected, window.len()));
        }
        if let Some(id) = window.iter().find(|&&id| id as usize >= limits.vocab) {
            let expected = format!("below the model's vocabulary of {}", limits.vocab);
            return Err(Error::range(format!("token id in window {w}"), expected, id));
        }
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((FileRecord { name, sha256, tokens: tokens as u64, windows: 0 }, windows))
}
