//! From files to windows.

use std::path::Path;

use super::options::{Select, TextOptions};
use super::pieces::{Counts, Limit, Pieces};
use super::read::{self, Documents, Format, Found, Source, Template};
use super::record::{FileRecord, SourceRecord, TextRecord};
use super::shares::{choose, shares};
use super::vocabulary::Vocabulary;
use super::windows::{Cut, Special, cut};
use crate::error::{Error, Locate, Result};

/// Bytes of text that are tokenised, over all sources.
const TOKENISED: usize = 16 << 20;
/// Bytes of text that hold a token, at most but for rare texts.
const BYTES_PER_TOKEN: usize = 16;

/// What the model can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Number of token ids.
    pub vocab: usize,
    /// Longest window, in tokens.
    pub longest: usize,
    /// Tokens of a window where nothing else is asked for.
    pub usual: usize,
}

/// The windows of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSource {
    /// The file's name without its ending, or the folder's name.
    pub name: String,
    /// Token ids.
    pub windows: Vec<Vec<u32>>,
}

/// Windows of token ids, by source.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    sources: Vec<TextSource>,
    record: TextRecord,
}

impl Text {
    /// Reads a file or a folder of files, tokenised by the `tokenizer.json` in `model`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a window that is empty or longer
    /// than the model allows, a text that is shorter than a window, a token outside the model's
    /// vocabulary, a mix of names that are no sources; [`ErrorKind::Io`](crate::ErrorKind::Io) for
    /// a missing file; [`ErrorKind::Format`](crate::ErrorKind::Format) for a damaged one;
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a file of another kind, a
    /// model without `tokenizer.json`, and for text in a build without the feature `text`. Each
    /// names the file.
    pub fn read(path: &Path, model: &Path, limits: Limits, options: &TextOptions) -> Result<Self> {
        let window = options.window.unwrap_or(limits.usual.min(limits.longest));
        if window == 0 || window > limits.longest {
            let expected = format!("1 to {} tokens (the model's context)", limits.longest);
            return Err(Error::range("window", expected, window));
        }
        let Found { sources, not_read } = read::sources(path)?;
        let names: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
        let mut shares = shares(&names, options).in_file(path)?;
        let reader = Reader::open(model, &sources, (limits, window), options)?;
        let mut read = Vec::with_capacity(sources.len());
        for (i, source) in sources.into_iter().enumerate() {
            let share = shares[i] / shares.iter().sum::<f64>();
            read.push(reader.source(source, i, share, names.len())?);
        }
        let short = match options.mix.is_empty() {
            true => join_short(&mut read, window, &reader.special),
            false => None,
        };
        if let Some(joined) = short {
            shares.push(1.0);
            read.push(joined);
        }
        let available: Vec<usize> = read.iter().map(|source| source.cut.available()).collect();
        if available.iter().all(|&n| n == 0) {
            let tokens: usize = read.iter().map(|source| source.cut.tokens()).sum();
            let expected = format!("at least one window of {window} tokens");
            return Err(Error::range("text", expected, format!("{tokens} tokens"))).in_file(path);
        }
        let chosen = choose(&available, &shares, window, options);
        let options = TextOptions { window: Some(window), ..options.clone() };
        Ok(reader.finish(read, &chosen, options, not_read))
    }

    /// The sources, in order.
    pub fn sources(&self) -> &[TextSource] {
        &self.sources
    }

    /// All windows, in order of the sources.
    pub fn windows(&self) -> impl Iterator<Item = &[u32]> {
        self.sources.iter().flat_map(|source| &source.windows).map(Vec::as_slice)
    }

    /// What was read and chosen.
    pub fn record(&self) -> &TextRecord {
        &self.record
    }
}

/// What all sources are read with.
struct Reader<'a> {
    vocabulary: Option<Vocabulary>,
    template: Template,
    special: Special,
    limits: Limits,
    window: usize,
    options: &'a TextOptions,
}

/// A source that was read and cut.
struct ReadSource {
    name: String,
    files: Vec<FileRecord>,
    cut: Cut,
    sampled: Option<u64>,
    padding: u64,
}

impl<'a> Reader<'a> {
    fn open(
        model: &Path,
        sources: &[Source],
        (limits, window): (Limits, usize),
        options: &'a TextOptions,
    ) -> Result<Self> {
        let mut files = sources.iter().flat_map(|source| &source.files);
        let is_text = files.any(|file| file.format != Format::Ids);
        let vocabulary = if is_text { Some(Vocabulary::open(model)?) } else { None };
        let special = match &vocabulary {
            Some(known) => known.special(options.special_tokens, &options.separator)?,
            None => Special::default(),
        };
        let template = Template::open(model, &options.conversations)?;
        if special.prefix.len() >= window {
            let expected = format!("more than the {} special tokens", special.prefix.len());
            return Err(Error::range("window", expected, window));
        }
        Ok(Self { vocabulary, template, special, limits, window, options })
    }

    /// Reads a source as far as its share of the tokens needs it.
    fn source(
        &self,
        source: Source,
        number: usize,
        share: f64,
        sources: usize,
    ) -> Result<ReadSource> {
        let mut pieces = Pieces::new(self.limit(share, sources), number as u64);
        let documents =
            Documents { field: self.options.field.as_deref(), template: &self.template };
        let mut files = Vec::with_capacity(source.files.len());
        for file in &source.files {
            read::read(&file.path, file.format, &documents, &mut pieces).in_file(&file.path)?;
            files.push(FileRecord {
                name: file.name.clone(),
                source: source.name.clone(),
                sha256: read::sha256(&file.path).in_file(&file.path)?,
                documents: 0,
                empty: 0,
                tokens: 0,
                windows: 0,
            });
        }
        let (pieces, counts, sampled) = pieces.finish();
        let mut padding = 0;
        for (file, counts) in files.iter_mut().zip(counts) {
            let Counts { documents, empty, padding: padded } = counts;
            (file.documents, file.empty) = (documents, empty);
            padding += padded;
        }
        let place = source.files.first().map(|file| file.path.as_path()).unwrap_or(Path::new(""));
        let cut = cut(pieces, self.vocabulary.as_ref(), (self.window, &self.special));
        let cut = cut.in_file(place)?;
        self.check(&cut).in_file(place)?;
        Ok(ReadSource { name: source.name, files, cut, sampled, padding })
    }

    /// What is kept of a source.
    fn limit(&self, share: f64, sources: usize) -> Limit {
        let needed = |tokens: usize| {
            let share = (tokens as f64 * share).ceil() as usize;
            (TOKENISED / sources).max(share.saturating_mul(BYTES_PER_TOKEN))
        };
        match self.options.select {
            Select::All => Limit::None,
            Select::Windows(n) => {
                let windows = (n / sources).max(1);
                let tokens = windows.saturating_mul(self.window);
                Limit::First((TOKENISED / sources).max(tokens.saturating_mul(BYTES_PER_TOKEN)))
            }
            Select::Tokens(tokens) => Limit::Sample(needed(tokens), self.options.seed),
        }
    }

    /// Fails for a token that the model does not have.
    fn check(&self, cut: &Cut) -> Result<()> {
        let vocab = self.limits.vocab;
        match (cut.beyond(vocab, &self.special), &self.vocabulary) {
            (None, _) => Ok(()),
            (Some((_, id)), Some(vocabulary)) => Err(vocabulary.beyond(id, vocab)),
            (Some((window, id)), None) => {
                let expected = format!("below the model's vocabulary of {vocab}");
                Err(Error::range(format!("token id in window {window}"), expected, id))
            }
        }
    }

    /// The chosen windows, and what is recorded of all.
    fn finish(
        &self,
        read: Vec<ReadSource>,
        chosen: &[Vec<usize>],
        options: TextOptions,
        not_read: Vec<String>,
    ) -> Text {
        let (mut sources, mut records, mut files, mut padding) =
            (Vec::new(), Vec::new(), Vec::new(), 0);
        for (source, chosen) in read.into_iter().zip(chosen) {
            let by_file = source.cut.by_file(source.files.len(), chosen);
            for (mut file, (tokens, windows)) in source.files.into_iter().zip(by_file) {
                (file.tokens, file.windows) = (tokens, windows);
                files.push(file);
            }
            padding += source.padding;
            let windows = source.cut.take(chosen, &self.special);
            records.push(SourceRecord {
                name: source.name.clone(),
                available: source.cut.available() as u64,
                windows: windows.len() as u64,
                tokens: windows.iter().map(|window| window.len() as u64).sum(),
                left_over: source.cut.left_over as u64,
                sampled: source.sampled,
            });
            sources.push(TextSource { name: source.name, windows });
        }
        let record = TextRecord {
            files,
            tokenizer_sha256: self.vocabulary.as_ref().map(|v| v.sha256().to_owned()),
            template: self.template.record(),
            prefix: self.special.prefix.clone(),
            separator: self.special.separator,
            options,
            windows: records.iter().map(|source| source.windows).sum(),
            tokens: records.iter().map(|source| source.tokens).sum(),
            sources: records,
            padding,
            not_read,
            own_text: None,
        };
        Text { sources, record }
    }
}

/// The sources that are shorter than a window as one more source, if there are several.
fn join_short(read: &mut [ReadSource], window: usize, special: &Special) -> Option<ReadSource> {
    let is_short =
        |source: &&mut ReadSource| source.cut.available() == 0 && source.cut.tokens() > 0;
    let mut short: Vec<&mut ReadSource> = read.iter_mut().filter(is_short).collect();
    if short.len() < 2 {
        return None;
    }
    let mut parts: Vec<&mut Cut> = short.iter_mut().map(|source| &mut source.cut).collect();
    let cut = Cut::join(&mut parts, window, special);
    let name = format!("{} files shorter than a window", short.len());
    Some(ReadSource { name, files: Vec::new(), cut, sampled: None, padding: 0 })
}
