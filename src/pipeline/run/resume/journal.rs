//! What a run has done so far, kept in the target's partial folder so that another run can go on.
//!
//! One JSON value a line: what the run works on, then the groups of all layers, then a line for
//! every layer that is on the disk. A line is written only after what it tells is true, and a torn
//! last line is forgotten.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Factoring;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Grouping, LayerId};
use crate::pipeline::report::{LayerReport, Report};
use crate::pipeline::run::resume::fingerprint::Fingerprint;

const NAME: &str = "mcsmoe.journal";

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    /// What the run works on; always the first.
    Run(Fingerprint),
    /// SHA-256 of the statistics that were collected.
    Statistics(String),
    /// The groups of layers that are merged: of all, or of one before it is written.
    Groups(Vec<(LayerId, Grouping)>),
    /// Under a size budget, what is left of the matrices of all layers that are merged.
    Ranks(Vec<(LayerId, Factoring)>),
    /// A layer that was written, and SHA-256 of its tensors.
    Layer(Box<LayerReport>, String),
    /// Everything is in the folder: what is left is to give it its name.
    Whole(Box<Report>),
}

/// An open journal. Only one process has it open at a time.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    pub(crate) statistics: Option<String>,
    pub(crate) groups: Option<Vec<(LayerId, Grouping)>>,
    pub(crate) ranks: Option<Vec<(LayerId, Factoring)>>,
    pub(crate) layers: BTreeMap<LayerId, (LayerReport, String)>,
}

impl Journal {
    /// Opens the journal of a partial folder, or begins one in an empty folder.
    ///
    /// # Errors
    /// [`ErrorKind::Target`] when another run is at work in the folder, when it was left by a run
    /// of other inputs, or when it holds something, but no journal; [`ErrorKind::Io`].
    pub(crate) fn open(folder: &Path, print: &Fingerprint) -> Result<Self> {
        let path = folder.join(NAME);
        let io = |what| move |e| Error::io(what, e);
        let mut options = File::options();
        options.read(true).write(true).create(is_empty(folder).in_file(folder)?).truncate(false);
        let file = match options.open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(refuse("it holds no journal of a run: delete it")).in_file(folder);
            }
            file => file.map_err(io("open journal")).in_file(&path)?,
        };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(refuse("another run is at work in it")).in_file(folder);
            }
            // Where files cannot be locked, a second run is the user's to avoid.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let (statistics, groups, ranks, layers) = (None, None, None, BTreeMap::new());
        let mut journal = Self { path: path.clone(), file, statistics, groups, ranks, layers };
        let lines = journal.read().map_err(io("read journal")).in_file(&path)?;
        match lines.split_first() {
            None if is_empty(folder).in_file(folder)? => {
                journal.write(&Line::Run(print.clone()))?
            }
            Some((Line::Run(found), _)) if found == print => {}
            Some((Line::Run(found), _)) => {
                let reason = format!("left by a run with another {}", found.difference(print));
                return Err(refuse(&reason)).in_file(folder);
            }
            _ => {
                return Err(refuse("it holds no journal of a run: delete it")).in_file(folder);
            }
        }
        for line in lines {
            match line {
                Line::Statistics(sha256) => journal.statistics = Some(sha256),
                Line::Groups(groups) => journal.groups.get_or_insert_default().extend(groups),
                Line::Ranks(ranks) => journal.ranks = Some(ranks),
                Line::Layer(report, digest) => {
                    journal.layers.insert(report.layer, (*report, digest));
                }
                Line::Run(_) | Line::Whole(_) => {}
            }
        }
        Ok(journal)
    }

    /// The report of a run that ended between giving the target its name and removing the journal;
    /// removes it.
    pub(crate) fn whole(target: &Path, print: &Fingerprint) -> Result<Option<Report>> {
        let path = target.join(NAME);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
        let lines = parse(&text).0;
        let (Some(Line::Run(found)), Some(Line::Whole(report))) = (lines.first(), lines.last())
        else {
            return Ok(None);
        };
        if found != print {
            return Ok(None);
        }
        Self::remove(target)?;
        Ok(Some((**report).clone()))
    }

    /// Removes the journal of a finished target.
    pub(crate) fn remove(target: &Path) -> Result<()> {
        let path = target.join(NAME);
        fs::remove_file(&path).map_err(|e| Error::io("remove journal", e)).in_file(&path)
    }

    /// Removes the folder of a run that has failed before there was anything to go on from.
    pub(crate) fn discard_if_empty(folder: &Path) {
        let Ok(mut file) = File::open(folder.join(NAME)) else { return };
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            // Another run has resumed it meanwhile.
            return;
        }
        let mut text = String::new();
        if file.read_to_string(&mut text).is_err() {
            return;
        }
        let lines = parse(&text).0;
        if !lines.iter().any(|l| matches!(l, Line::Statistics(_) | Line::Layer(..))) {
            // The run's own error is what is told.
            let _ = fs::remove_dir_all(folder);
        }
    }

    /// All whole lines; what follows the last is cut off.
    fn read(&mut self) -> std::io::Result<Vec<Line>> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        let (lines, length) = parse(&String::from_utf8_lossy(&bytes));
        self.file.set_len(length as u64)?;
        self.file.seek(SeekFrom::Start(length as u64))?;
        Ok(lines)
    }

    /// Appends a line and makes it outlast a power cut.
    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_string(line).map_err(|e| -> Error {
            ErrorKind::Format { format: "journal", reason: e.to_string() }.into()
        })?;
        text.push('\n');
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| Error::io("write journal", e)).in_file(&self.path)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // A process that this one is about to start may hold a copy of the file until it does:
        // closing alone would leave the lock to it. There is nobody left to tell of a failure.
        let _ = self.file.unlock();
    }
}

fn refuse(reason: &str) -> Error {
    ErrorKind::Target { reason: reason.into() }.into()
}

/// The lines up to the first that is torn or not understood, and the length of their text.
fn parse(text: &str) -> (Vec<Line>, usize) {
    let (mut lines, mut length) = (Vec::new(), 0);
    for line in text.split_inclusive('\n').take_while(|line| line.ends_with('\n')) {
        let Ok(parsed) = serde_json::from_str(line) else { break };
        lines.push(parsed);
        length += line.len();
    }
    (lines, length)
}

/// Whether a folder holds nothing but a journal.
fn is_empty(folder: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(folder).map_err(|e| Error::io("list", e))?;
    Ok(entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == NAME)))
}
