//! The checks on an open target.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::{Checkpoint, FolderListing, ListedTensor};
use crate::error::{ErrorKind, Result};
use crate::forward::Model;
use crate::model::Finite;
use crate::par;
use crate::stage::Context;

/// Tokens of the short forward.
const TOKENS: usize = 16;

/// Names, types, shapes and files against the outline.
pub(super) fn tensors(target: &Checkpoint, outline: &FolderListing) -> Vec<String> {
    let mut expected: BTreeMap<&str, &ListedTensor> =
        outline.tensors.iter().map(|t| (&*t.name, t)).collect();
    let mut findings = Vec::new();
    for (name, dtype, shape) in target.tensors() {
        match expected.remove(name) {
            None => findings.push(format!("{name}: no tensor of this name follows from the plan")),
            Some(t) if t.dtype != dtype || t.shape != shape => {
                let planned = format!("{} {:?}", t.dtype, t.shape);
                findings.push(format!(
                    "{name}: {planned} follows from the plan, found {dtype} {shape:?}"
                ));
            }
            Some(_) => {}
        }
    }
    findings.extend(expected.keys().map(|name| format!("{name}: missing")));
    for (name, size) in &outline.files {
        let found = std::fs::metadata(target.dir().join(name)).map(|data| data.len());
        match found {
            Ok(found) if found == *size => {}
            Ok(found) => findings.push(format!("{name}: {size} bytes expected, {found} found")),
            Err(error) => findings.push(format!("{name}: {error}")),
        }
    }
    findings
}

/// Copied tensors against the source; how many, and which differ. Experts that joined no other are
/// compared where nothing can have `touched` them.
pub(super) fn copies(
    source: &Checkpoint,
    target: &Checkpoint,
    outline: &FolderListing,
    untouched: bool,
) -> (usize, Vec<String>) {
    let copied = outline.tensors.iter().filter_map(|t| Some((&t.name, t.copies.as_ref()?)));
    let mut pairs: Vec<(&String, &String)> = copied.collect();
    if untouched {
        pairs.extend(outline.alone.iter().map(|(to, from)| (to, from)));
    }
    let differs = |(to, from): (&String, &String)| match target.tensor_bytes(to) {
        // That it is missing has been told.
        Err(_) => None,
        Ok(bytes) => match source.tensor_bytes(from) {
            Ok(original) if original == bytes => None,
            Ok(_) => Some(format!("{to}: not the bytes of the source's {from}")),
            Err(error) => Some(error.to_string()),
        },
    };
    let found = par::map(pairs.len(), |i| Ok(differs(pairs[i])));
    (pairs.len(), found.into_iter().flatten().flatten().collect())
}

/// Every tensor that holds something else than finite numbers.
pub(super) fn values(target: &Checkpoint) -> Vec<String> {
    let names: Vec<&str> = target.tensors().map(|(name, ..)| name).collect();
    let checked = par::map(names.len(), |i| {
        Ok(target.check_finite(names[i]).err().map(|error| error.to_string()))
    });
    checked.into_iter().flatten().flatten().collect()
}

/// A short forward: `None` for a family without one.
pub(super) fn forward(target: &Checkpoint, cx: &Context) -> Result<Option<String>> {
    let model = match Model::open_on(target, cx.clone()) {
        Ok(model) => model,
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Spread over the vocabulary: what matters is that numbers come out, not which.
    let ids = |vocab: usize| -> Vec<u32> {
        (0..TOKENS).map(|i| ((i * 7919 + 11) % vocab.max(1)) as u32).collect()
    };
    let logits = match &model {
        Model::Causal(model) => model.logits(&ids(model.spec().vocab))?,
        Model::Switch(model) => {
            let ids = ids(model.spec().vocab);
            model.logits(&ids, &model.spec().shifted(&ids))?
        }
    };
    logits.check_finite("logits")?;
    let (tokens, vocab) = logits.dim();
    Ok(Some(format!("{tokens} tokens, {vocab} logits each, from {}", name_of(target.dir()))))
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
