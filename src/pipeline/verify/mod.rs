//! Whether a written folder is what its manifest says: reopened, accounted for, tried.
//!
//! Nothing is taken on trust from the run that wrote the folder but its plan (which experts were
//! joined, and in which form they are written). From the plan and the source's headers follows what
//! every tensor of the target must be called and look like; that is compared with what is there.

mod checks;
mod manifest;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::manifest::EVALUATION;

use self::manifest::Manifest;
use crate::checkpoint::{Checkpoint, FolderListing, SourceTensorUse};
use crate::error::{Error, Result};
use crate::stage::Context;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All of it holds.
    Passed,
    /// It could not be made, for the reason told.
    Skipped,
    /// Something is not as it must be.
    Failed,
}

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckName {
    /// The files that the manifest lists, their sizes and hashes.
    Files,
    /// Headers, index and `config.json`.
    Open,
    /// Whether there is a source to compare with.
    Source,
    /// Names, data types and shapes of all tensors.
    Tensors,
    /// The text of `config.json`.
    Config,
    /// Bytes that are only copied.
    Copies,
    /// Whether every number is finite.
    Values,
    /// Sixteen tokens through the model.
    Forward,
}

impl CheckName {
    /// As JSON spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Open => "open",
            Self::Source => "source",
            Self::Tensors => "tensors",
            Self::Config => "config",
            Self::Copies => "copies",
            Self::Values => "values",
            Self::Forward => "forward",
        }
    }
}

impl std::fmt::Display for CheckName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What was done with a tensor of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorAction {
    /// Its bytes were copied.
    Copied,
    /// Its numbers were written in another element type.
    Dequantised,
    /// A router, kept or narrowed.
    Router,
    /// Of an expert in a group of its own.
    Alone,
    /// Of an expert in a group with others, of which one stands for all.
    Grouped,
    /// Of an expert in no group.
    Pruned,
    /// Shared by all experts of a layer.
    Shared,
    /// Left out, for a reason.
    Dropped,
}

impl std::fmt::Display for TensorAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Copied => "copied",
            Self::Dequantised => "dequantised",
            Self::Router => "router",
            Self::Alone => "alone",
            Self::Grouped => "grouped",
            Self::Pruned => "pruned",
            Self::Shared => "shared",
            Self::Dropped => "dropped",
        })
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked.
    pub name: CheckName,
    /// How it ended.
    pub verdict: Verdict,
    /// What was looked at, or why it was not.
    pub detail: String,
    /// Everything that is not as it must be.
    pub findings: Vec<String>,
}

/// What was done with one tensor of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// The source's tensor.
    pub tensor: String,
    /// What was done with it.
    pub action: TensorAction,
    /// Into which group of which layer, or why not.
    pub detail: String,
}

/// What [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// The folder.
    pub target: PathBuf,
    /// All checks, in order.
    pub checks: Vec<Check>,
    /// Number of the source's tensors by what was done with them.
    pub account: BTreeMap<TensorAction, u64>,
    /// Every tensor of the source; empty without one.
    pub tensors: Vec<TensorRecord>,
}

impl Verification {
    /// Everything that is not as it must be, with the name of the check.
    pub fn findings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.checks.iter().flat_map(|c| c.findings.iter().map(|d| (c.name.as_str(), &**d)))
    }

    /// Whether nothing was found. Checks that were skipped leave none.
    pub fn is_clean(&self) -> bool {
        self.findings().next().is_none()
    }

    fn add(&mut self, name: CheckName, detail: String, findings: Vec<String>) {
        let verdict = if findings.is_empty() { Verdict::Passed } else { Verdict::Failed };
        self.checks.push(Check { name, verdict, detail, findings });
    }

    fn skip(&mut self, name: CheckName, why: &str) {
        let (verdict, findings) = (Verdict::Skipped, Vec::new());
        self.checks.push(Check { name, verdict, detail: why.into(), findings });
    }

    fn fail(&mut self, name: CheckName, error: &Error) {
        self.add(name, String::new(), vec![error.to_string()]);
    }
}

/// Checks a folder that a run has written:
///
/// 1. `files`: every file that the manifest lists is there with its size and SHA-256, and no file
///    of weights, configuration or code lies beside them;
/// 2. `open`: headers, index and `config.json` fit each other, every expert and router has the
///    shape that the config asks for;
/// 3. with the source, `tensors`: names, data types, shapes and files of all tensors are those that
///    follow from the source and the recorded plan, none is missing and none too many;
/// 4. with the source, `config`: the text is the source's, edited as the plan asks, and every file
///    of the source that is not a weight is there;
/// 5. with the source, `copies`: what is only copied has the source's bytes, experts that joined no
///    other too, unless recovery or compression may have changed them;
/// 6. `values`: every floating-point number is finite;
/// 7. `forward`: sixteen tokens run through the model give finite logits.
///
/// What fails is a finding in the result, not an error. Without a source 3 to 5 are skipped, and
/// without a native forward pass of the family 7 is. Merged weights themselves cannot be known
/// without repeating the run: for them there are hashes, shapes and finiteness.
///
/// # Errors
/// Those of [`Checkpoint::open`] on the source. Everything that is wrong with the target is a
/// finding.
///
/// # Cost
/// The target's bytes are read three times, the source's copied ones once; memory as a forward
/// pass, one layer in `f32`.
pub fn verify(target: &Path, source: Option<&Path>) -> Result<Verification> {
    let source = source.map(Checkpoint::open).transpose()?;
    let mut found = Verification {
        target: target.to_owned(),
        checks: Vec::new(),
        account: BTreeMap::new(),
        tensors: Vec::new(),
    };
    let manifest = match Manifest::read(target) {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            found.fail(CheckName::Files, &error);
            None
        }
    };
    if let Some(manifest) = &manifest {
        let findings = manifest.check_files(target);
        found.add(CheckName::Files, format!("{} files", manifest.files.len()), findings);
    }
    let opened = match Checkpoint::open(target) {
        Ok(opened) => opened,
        Err(error) => {
            found.fail(CheckName::Open, &error);
            return Ok(found);
        }
    };
    let (tensors, layers) = (opened.tensors().count(), opened.layers().len());
    found.add(CheckName::Open, format!("{tensors} tensors, {layers} MoE layers"), Vec::new());
    match (&source, &manifest) {
        (Some(source), Some(manifest)) => against(&mut found, source, &opened, manifest),
        (None, _) => found.skip(CheckName::Source, "no source was given"),
        (Some(_), None) => found.skip(CheckName::Source, "no manifest says what was done with it"),
    }
    let findings = checks::values(&opened);
    found.add(CheckName::Values, format!("{tensors} tensors"), findings);
    match checks::forward(&opened, &Context::cpu(0)) {
        Ok(Some(detail)) => found.add(CheckName::Forward, detail, Vec::new()),
        Ok(None) => found.skip(CheckName::Forward, "no native forward pass of this family"),
        Err(error) => found.fail(CheckName::Forward, &error),
    }
    Ok(found)
}

/// What needs the source.
fn against(
    found: &mut Verification,
    source: &Checkpoint,
    target: &Checkpoint,
    manifest: &Manifest,
) {
    let outline = match source.outline(&manifest.plan) {
        Ok(outline) => outline,
        Err(error) => return found.fail(CheckName::Source, &error),
    };
    account(found, &outline);
    let findings = checks::tensors(target, &outline);
    found.add(CheckName::Tensors, format!("{} expected", outline.tensors.len()), findings);
    let same = target.config().text() == outline.config;
    let mut findings = if same { Vec::new() } else { vec!["not the source's, as planned".into()] };
    let missing = outline.companions.iter().filter(|name| !target.dir().join(name).is_file());
    findings.extend(missing.map(|name| format!("{name}: the source has it, the target has not")));
    found.add(CheckName::Config, format!("{} bytes", outline.config.len()), findings);
    let untouched = !manifest.changes_experts();
    let (compared, findings) = checks::copies(source, target, &outline, untouched);
    found.add(CheckName::Copies, format!("{compared} tensors equal their originals"), findings);
}

fn account(found: &mut Verification, outline: &FolderListing) {
    for (tensor, fate) in &outline.sources {
        let (action, detail) = match fate {
            SourceTensorUse::Copied => (TensorAction::Copied, String::new()),
            SourceTensorUse::Dequantised => (TensorAction::Dequantised, String::new()),
            SourceTensorUse::Router(layer) => (TensorAction::Router, format!("of {layer}")),
            SourceTensorUse::Alone(layer, e) => {
                (TensorAction::Alone, format!("expert {e} of {layer}"))
            }
            SourceTensorUse::Merged(layer, e, g) => {
                (TensorAction::Grouped, format!("expert {e} of {layer}, group {g}"))
            }
            SourceTensorUse::Pruned(layer, e) => {
                (TensorAction::Pruned, format!("expert {e} of {layer}, in no group"))
            }
            SourceTensorUse::Shared(layer) => {
                (TensorAction::Shared, format!("all experts of {layer}"))
            }
            SourceTensorUse::Dropped(why) => (TensorAction::Dropped, why.clone()),
        };
        *found.account.entry(action).or_insert(0) += 1;
        found.tensors.push(TensorRecord { tensor: tensor.clone(), action, detail });
    }
}
