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

use self::manifest::Manifest;
use crate::checkpoint::{Checkpoint, Fate, Outline};
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
    Doubt,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked: `files`, `open`, `source`, `tensors`, `config`, `copies`, `values`,
    /// `forward`.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// What was looked at, or why it was not.
    pub detail: String,
    /// Everything that is not as it must be.
    pub doubts: Vec<String>,
}

/// What became of the tensors of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorFate {
    /// The source's tensor.
    pub tensor: String,
    /// `copied`, `dequantised`, `router`, `alone`, `merged`, `pruned`, `shared` or `dropped`.
    pub fate: String,
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
    /// Number of the source's tensors by fate.
    pub account: BTreeMap<String, u64>,
    /// Every tensor of the source; empty without one.
    pub tensors: Vec<TensorFate>,
}

impl Verification {
    /// Everything that is not as it must be, with the name of the check.
    pub fn doubts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.checks.iter().flat_map(|c| c.doubts.iter().map(|d| (&*c.name, &**d)))
    }

    /// Whether there is no doubt. Checks that were skipped leave none.
    pub fn is_clean(&self) -> bool {
        self.doubts().next().is_none()
    }

    fn add(&mut self, name: &str, detail: String, doubts: Vec<String>) {
        let verdict = if doubts.is_empty() { Verdict::Passed } else { Verdict::Doubt };
        self.checks.push(Check { name: name.into(), verdict, detail, doubts });
    }

    fn skip(&mut self, name: &str, why: &str) {
        let (verdict, doubts) = (Verdict::Skipped, Vec::new());
        self.checks.push(Check { name: name.into(), verdict, detail: why.into(), doubts });
    }

    fn doubt(&mut self, name: &str, error: &Error) {
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
/// 4. with the source, `config`: the text is the source's, edited as the plan asks;
/// 5. with the source, `copies`: what is only copied has the source's bytes, experts that joined no
///    other too, unless recovery or compression may have changed them;
/// 6. `values`: every floating-point number is finite;
/// 7. `forward`: sixteen tokens run through the model give finite logits.
///
/// What fails is a doubt in the result, not an error. Without a source 3 to 5 are skipped, and
/// without a native forward pass of the family 7 is. Merged weights themselves cannot be known
/// without repeating the run: for them there are hashes, shapes and finiteness.
///
/// # Errors
/// Those of [`Checkpoint::open`] on the source. Everything that is wrong with the target is a
/// doubt.
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
            found.doubt("files", &error);
            None
        }
    };
    if let Some(manifest) = &manifest {
        let doubts = manifest.check_files(target);
        found.add("files", format!("{} files", manifest.files.len()), doubts);
    }
    let opened = match Checkpoint::open(target) {
        Ok(opened) => opened,
        Err(error) => {
            found.doubt("open", &error);
            return Ok(found);
        }
    };
    let (tensors, layers) = (opened.tensors().count(), opened.layers().len());
    found.add("open", format!("{tensors} tensors, {layers} MoE layers"), Vec::new());
    match (&source, &manifest) {
        (Some(source), Some(manifest)) => against(&mut found, source, &opened, manifest),
        (None, _) => found.skip("source", "no source was given"),
        (Some(_), None) => found.skip("source", "no manifest says what was done with it"),
    }
    let doubts = checks::values(&opened);
    found.add("values", format!("{tensors} tensors"), doubts);
    match checks::forward(&opened, &Context::cpu(0)) {
        Ok(Some(detail)) => found.add("forward", detail, Vec::new()),
        Ok(None) => found.skip("forward", "no native forward pass of this family"),
        Err(error) => found.doubt("forward", &error),
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
        Err(error) => return found.doubt("source", &error),
    };
    account(found, &outline);
    let doubts = checks::tensors(target, &outline);
    found.add("tensors", format!("{} expected", outline.tensors.len()), doubts);
    let same = target.config().text() == outline.config;
    let doubts = if same { Vec::new() } else { vec!["not the source's, as planned".into()] };
    found.add("config", format!("{} bytes", outline.config.len()), doubts);
    let untouched = !manifest.changes_experts();
    let (compared, doubts) = checks::copies(source, target, &outline, untouched);
    found.add("copies", format!("{compared} tensors equal their originals"), doubts);
}

fn account(found: &mut Verification, outline: &Outline) {
    for (tensor, fate) in &outline.sources {
        let (fate, detail) = match fate {
            Fate::Copied => ("copied", String::new()),
            Fate::Dequantised => ("dequantised", String::new()),
            Fate::Router(layer) => ("router", format!("of {layer}")),
            Fate::Alone(layer, e) => ("alone", format!("expert {e} of {layer}")),
            Fate::Merged(layer, e, g) => ("merged", format!("expert {e} of {layer}, group {g}")),
            Fate::Pruned(layer, e) => ("pruned", format!("expert {e} of {layer}, in no group")),
            Fate::Shared(layer) => ("shared", format!("all experts of {layer}")),
            Fate::Dropped(why) => ("dropped", why.clone()),
        };
        *found.account.entry(fate.to_owned()).or_insert(0) += 1;
        let (tensor, fate) = (tensor.clone(), fate.to_owned());
        found.tensors.push(TensorFate { tensor, fate, detail });
    }
}
