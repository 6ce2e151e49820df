//! The manifest of a written folder, and its files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::checkpoint::{MANIFEST, WritePlan};
use crate::error::{Error, Locate, Result};
use crate::par;
use crate::pipeline::run::resume::fingerprint;
use crate::tensor_file::read_json;

/// The file in a target in which its evaluation is kept.
pub const EVALUATION: &str = "mcsmoe.evaluation.json";

/// A file as it was written.
#[derive(Debug, Deserialize)]
pub(super) struct Recorded {
    bytes: u64,
    sha256: String,
}

/// What verification needs of the manifest.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) plan: WritePlan,
    pub(super) files: BTreeMap<String, Recorded>,
    #[serde(default)]
    stages: Vec<String>,
}

impl Manifest {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        read_json(&folder.join(MANIFEST), "read manifest", "manifest")
    }

    /// Whether a stage may have changed experts that joined no other.
    pub(super) fn changes_experts(&self) -> bool {
        let changes =
            |stage: &String| ["recover ", "compress "].iter().any(|kind| stage.starts_with(kind));
        // A folder that was written without a pipeline tells nothing of what was done.
        self.stages.is_empty() || self.stages.iter().any(changes)
    }

    /// Every listed file against what lies there, and what lies there against the list.
    pub(super) fn check_files(&self, folder: &Path) -> Vec<String> {
        let files: Vec<(&String, &Recorded)> = self.files.iter().collect();
        let checked = par::map(files.len(), |i| {
            let (name, recorded) = files[i];
            Ok(check(folder, name, recorded))
        });
        let mut findings: Vec<String> = checked.into_iter().flatten().flatten().collect();
        let index = "model.safetensors.index.json";
        if !self.files.contains_key("config.json") {
            findings.push("the manifest lists no config.json".into());
        }
        match unlisted_files(folder, &self.files.keys().map(|name| &**name).collect()) {
            Ok(names) => findings.extend(names.iter().map(|name| {
                let what = if name == index { "an index" } else { "a file" };
                format!("{name}: {what} that the manifest does not list")
            })),
            Err(error) => findings.push(error.to_string()),
        }
        findings
    }
}

fn check(folder: &Path, name: &str, recorded: &Recorded) -> Option<String> {
    let plain = |part| matches!(part, Component::Normal(_));
    if !Path::new(name).components().all(plain) {
        return Some(format!("{name}: not the name of a file in the folder"));
    }
    let path = folder.join(name);
    match fs::metadata(&path) {
        Err(error) => return Some(format!("{name}: {error}")),
        Ok(data) if data.len() != recorded.bytes => {
            let (expected, found) = (recorded.bytes, data.len());
            return Some(format!("{name}: {expected} bytes were written, {found} are there"));
        }
        Ok(_) => {}
    }
    match fingerprint::of_file(&path) {
        Err(error) => Some(error.to_string()),
        Ok(found) if found != recorded.sha256 => {
            Some(format!("{name}: its SHA-256 is not that of what was written"))
        }
        Ok(_) => None,
    }
}

/// Files that a runtime might read but that nobody wrote. Reports and cards are for people.
fn unlisted_files(folder: &Path, listed: &BTreeSet<&str>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    add_unlisted(folder, "", listed, &mut names)?;
    names.sort_unstable();
    Ok(names)
}

/// Adds the unlisted files of a folder whose path below the target is `prefix`.
fn add_unlisted(
    folder: &Path,
    prefix: &str,
    listed: &BTreeSet<&str>,
    names: &mut Vec<String>,
) -> Result<()> {
    let list = |e| Error::io("list folder", e);
    for entry in fs::read_dir(folder).map_err(list).in_file(folder)? {
        let path = entry.map_err(list).in_file(folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{prefix}{name}");
        let for_people = [".md", ".html", ".txt", ".svg"].iter().any(|end| name.ends_with(end));
        let within = format!("{name}/");
        if listed.iter().any(|other| other.starts_with(&within)) {
            add_unlisted(&path, &within, listed, names)?;
        } else if ![MANIFEST, EVALUATION].contains(&&*name)
            && !for_people
            && !listed.contains(&*name)
        {
            names.push(name);
        }
    }
    Ok(())
}
