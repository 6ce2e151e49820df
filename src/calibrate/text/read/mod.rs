//! Files in: what a path holds, and its documents or token ids, a piece at a time.

#[cfg(feature = "text")]
mod conversation;
#[cfg(feature = "text")]
mod decompress;
mod format;
mod ids;
#[cfg(feature = "text")]
mod json;
#[cfg(feature = "text")]
mod plain;
mod source;
#[cfg(feature = "text")]
mod template;

use std::path::Path;

pub(super) use format::{Format, sha256};
pub(super) use source::{Found, Source, sources};
#[cfg(feature = "text")]
pub(super) use template::Template;

use super::pieces::Pieces;
use crate::error::{Error, ErrorKind, Result};

/// Stands for a chat template in builds that have none.
#[cfg(not(feature = "text"))]
pub(super) struct Template;

#[cfg(not(feature = "text"))]
impl Template {
    /// There is none to read: text, the only thing that needs it, is refused.
    #[allow(clippy::unnecessary_wraps)] // As the other build's.
    pub(super) fn open(_: &Path, _: &super::options::Conversations) -> Result<Self> {
        Ok(Self)
    }

    pub(super) fn record(&self) -> Option<super::record::TemplateRecord> {
        None
    }
}

/// What a reader of JSON has to know.
pub(super) struct Documents<'a> {
    /// The field to read.
    pub(super) field: Option<&'a str>,
    /// What turns conversations into text.
    pub(super) template: &'a Template,
}

/// Reads a file into pieces.
///
/// # Errors
/// [`ErrorKind::Format`] with the line of JSON or the byte of text that cannot be read,
/// [`ErrorKind::Unsupported`] for text in a build without the feature `text`, [`ErrorKind::Io`].
pub(super) fn read(
    path: &Path,
    format: Format,
    documents: &Documents<'_>,
    pieces: &mut Pieces,
) -> Result<()> {
    pieces.file();
    match format {
        Format::Ids => ids::read(path, pieces),
        #[cfg(feature = "text")]
        Format::Plain => plain::read(&mut *decompress::open(path)?, pieces),
        #[cfg(feature = "text")]
        Format::Json => json::read(&mut *decompress::open(path)?, documents, pieces),
        #[cfg(not(feature = "text"))]
        Format::Plain | Format::Json => {
            let _ = (documents.field, documents.template);
            Err(super::vocabulary::without_tokenizer())
        }
    }
}

pub(super) fn malformed(format: &'static str, reason: impl Into<String>) -> Error {
    ErrorKind::Format { format, reason: reason.into() }.into()
}
