//! What is known of a target beside its report.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::{MANIFEST, read_json};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::pipeline::{Comparison, EVALUATION, Evaluation};

/// A file of the target, as its manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRecord {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
}

/// How well the target predicts text.
#[derive(Debug, Clone, PartialEq)]
pub enum Quality {
    /// Alone.
    Score(Box<Evaluation>),
    /// Beside the original.
    Comparison(Box<Comparison>),
}

impl Quality {
    /// From the JSON of an [`Evaluation`] or a [`Comparison`], as `mcsmoe evaluate --json` prints
    /// them, or of a run with a `comparison`, as `mcsmoe run --evaluate TEXT --json` does.
    ///
    /// # Errors
    /// [`Format`](ErrorKind::Format) when it is none of these.
    pub fn from_json(text: &str) -> Result<Self> {
        let invalid = |reason: String| ErrorKind::Format { format: "evaluation", reason };
        let wrong = |e: serde_json::Error| invalid(e.to_string());
        let mut value: Value = serde_json::from_str(text).map_err(wrong)?;
        if let Some(inner) = value.get_mut("comparison") {
            value = inner.take();
        } else if value.get("report").is_some() {
            let reason = "a run without a comparison: give it --evaluate TEXT";
            return Err(invalid(reason.into()).into());
        }
        Ok(match value.get("kl") {
            Some(_) => Self::Comparison(serde_json::from_value(value).map_err(wrong)?),
            None => Self::Score(serde_json::from_value(value).map_err(wrong)?),
        })
    }

    /// [`Quality::from_json`] of a file.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) and those of [`Quality::from_json`], with the file.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|e| Error::io("read evaluation", e));
        text.and_then(|text| Self::from_json(&text)).in_file(file)
    }

    /// Keeps it in a folder that a run has written, in the place of an earlier one: reports that
    /// are
    /// made later have it.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) with the file.
    pub fn keep(&self, target: &Path) -> Result<()> {
        let json = match self {
            Self::Score(found) => found.to_json()?,
            Self::Comparison(found) => found.to_json()?,
        };
        let (file, new) = (target.join(EVALUATION), target.join(format!(".{EVALUATION}.new")));
        let written = std::fs::write(&new, json + "\n").and_then(|()| std::fs::rename(&new, &file));
        written.map_err(|e| Error::io("keep evaluation", e)).in_file(&file)
    }

    /// What [`Quality::keep`] has kept in a folder, if anything.
    ///
    /// # Errors
    /// As [`Quality::read`].
    pub fn kept(target: &Path) -> Result<Option<Self>> {
        let file = target.join(EVALUATION);
        if file.is_file() { Self::read(&file).map(Some) } else { Ok(None) }
    }

    pub(super) fn comparison(&self) -> Option<&Comparison> {
        match self {
            Self::Score(_) => None,
            Self::Comparison(found) => Some(found),
        }
    }

    /// The target's own score.
    pub(super) fn target(&self) -> &Evaluation {
        match self {
            Self::Score(found) => found,
            Self::Comparison(found) => &found.other,
        }
    }
}

/// What is known of a target beside its report; all of it may be left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Details {
    /// Name of the target for the page's heading.
    pub name: Option<String>,
    /// Name of the original on a model hub, `ORGANISATION/MODEL`, for the model card.
    pub base_model: Option<String>,
    /// Perplexity, divergence.
    pub quality: Option<Quality>,
    /// The files of the target.
    pub files: Vec<FileRecord>,
}

impl Details {
    /// Name and files of a folder that a run has written.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io); [`Format`](ErrorKind::Format) when its manifest cannot be read.
    pub fn read(target: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Recorded {
            bytes: u64,
            sha256: String,
        }
        #[derive(Deserialize)]
        struct Manifest {
            #[serde(default)]
            files: BTreeMap<String, Recorded>,
        }
        let path = if target.is_dir() { target.join(MANIFEST) } else { target.to_owned() };
        let Manifest { files } = read_json(&path, "read manifest", "manifest")?;
        let record = |(name, Recorded { bytes, sha256 })| FileRecord { name, bytes, sha256 };
        Ok(Self {
            name: target.file_name().map(|name| name.to_string_lossy().into_owned()),
            files: files.into_iter().map(record).collect(),
            ..Self::default()
        })
    }

    /// The name that `folder` has on a model hub, if it lies in a cache of the Hugging Face hub
    /// (`models--ORGANISATION--MODEL/snapshots/REVISION`).
    pub fn hub_name(folder: &Path) -> Option<String> {
        let parts = folder.components().rev();
        let names = parts.filter_map(|part| part.as_os_str().to_str());
        let cached = names.into_iter().find_map(|name| name.strip_prefix("models--"))?;
        let (organisation, model) = cached.split_once("--")?;
        Some(format!("{organisation}/{model}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_cache_tells_the_name() {
        let cached = Path::new("/x/hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/abc");
        assert_eq!(Details::hub_name(cached).as_deref(), Some("mistralai/Mixtral-8x7B-v0.1"));
        assert_eq!(Details::hub_name(Path::new("models/mixtral")), None);
    }

    #[test]
    fn what_is_no_evaluation_is_refused() {
        let refused =
            |text: &str| Quality::from_json(text).is_err_and(|e| !e.to_string().is_empty());
        assert!(["", "[]", "{}", "{\"report\": {}}", "{\"kl\": 1}"].iter().all(|t| refused(t)));
    }
}
