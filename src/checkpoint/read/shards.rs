//! Which safetensors files make up a checkpoint, and what the index says of each tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Locate, Result};
use crate::tensor_file::{Members, dangling, not_json, open_error};

/// The index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The only file of a checkpoint without shards.
pub(crate) const SINGLE: &str = "model.safetensors";
const FORMAT: &str = "safetensors index";

/// The files of a checkpoint, with the tensors that the index promises in each.
pub(crate) struct Files {
    /// In the order of their names.
    pub(crate) paths: Vec<PathBuf>,
    /// Tensor name to position in `paths`; `None` without an index.
    pub(crate) promised: Option<BTreeMap<String, usize>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Members<String>,
}

/// Finds the files of the checkpoint in `dir`.
pub(crate) fn files(dir: &Path) -> Result<Files> {
    let index = dir.join(INDEX);
    // Also a link to nothing, which is told with its target.
    let listed = |path: &Path| path.symlink_metadata().is_ok();
    if listed(&index) {
        return indexed(dir, &index).in_file(&index);
    }
    let single = dir.join(SINGLE);
    if listed(&single) {
        return Ok(Files { paths: vec![single], promised: None });
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list folder", e)).in_file(dir)? {
        let path = entry.map_err(|e| Error::io("list folder", e)).in_file(dir)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path);
        }
    }
    match found.len() {
        1 => Ok(Files { paths: found, promised: None }),
        n => {
            let reason = format!(
                "no {INDEX} or {SINGLE}, and {n} other safetensors files{}",
                other_weights(dir)
            );
            Err(Error::malformed("checkpoint folder", reason)).in_file(dir)
        }
    }
}

/// What to do with weights in another format.
fn other_weights(dir: &Path) -> String {
    const FORMATS: [(&str, &str); 5] = [
        ("bin", "PyTorch pickles"),
        ("pt", "PyTorch pickles"),
        ("pth", "PyTorch pickles"),
        ("gguf", "GGUF"),
        ("h5", "HDF5"),
    ];
    let names =
        fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut names: Vec<PathBuf> = names.collect();
    names.sort();
    let found = names.iter().find_map(|path| {
        let ending = path.extension()?;
        let (_, format) = FORMATS.iter().find(|(known, _)| ending == *known)?;
        Some((path.file_name()?.to_string_lossy().into_owned(), *format))
    });
    match found {
        None => String::new(),
        Some((name, "PyTorch pickles")) => format!(
            "; {name} is a PyTorch pickle, which is not read: convert it in Python with \
             `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`"
        ),
        Some((name, format)) => format!(
            "; {name} holds weights as {format}, which is not read: use the safetensors of the \
             original model"
        ),
    }
}

fn indexed(dir: &Path, index: &Path) -> Result<Files> {
    let text = fs::read_to_string(index).map_err(|e| open_error("read", index, e))?;
    let Index { weight_map: Members(map) } =
        serde_json::from_str(&text).map_err(|e| not_json(FORMAT, text.as_bytes(), &e))?;
    for (tensor, file) in &map {
        if !is_plain(file) {
            let reason = format!("`{file}` is not the name of a file in the checkpoint's folder");
            return Err(Error::malformed(FORMAT, reason)).in_tensor(tensor);
        }
    }
    let names: BTreeSet<&String> = map.iter().map(|(_, file)| file).collect();
    let position: BTreeMap<&String, usize> =
        names.iter().enumerate().map(|(i, name)| (*name, i)).collect();
    let mut promised = BTreeMap::new();
    for (tensor, file) in &map {
        let at = position[file];
        if promised.insert(tensor.clone(), at).is_some_and(|before| before != at) {
            return Err(Error::malformed(FORMAT, "it is mapped to two files")).in_tensor(tensor);
        }
    }
    if dir.join(SINGLE).exists() && !names.iter().any(|name| *name == SINGLE) {
        let reason = format!("the folder also holds {SINGLE}: which of the two is meant?");
        return Err(Error::malformed(FORMAT, reason));
    }
    let paths: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    check_present(&paths)?;
    Ok(Files { paths, promised: Some(promised) })
}

/// Lists all shards that are not there, and links to nothing with their targets.
fn check_present(paths: &[PathBuf]) -> Result<()> {
    let missing = paths.iter().filter(|path| !path.exists());
    let missing: Vec<String> = missing
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            dangling(path).map_or_else(|| name.to_string(), |reason| format!("{name} ({reason})"))
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let (n, of, names) = (missing.len(), paths.len(), missing.join(", "));
    let reason = format!("{n} of its {of} files are missing; download them: {names}");
    Err(Error::malformed(FORMAT, reason))
}

/// Whether `name` names a file of the folder itself: no separators, no `..`, no drive.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    plain && parts.next().is_none() && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_file_names_are_followed() {
        assert!(is_plain("model-00001-of-00002.safetensors"));
        for bad in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a/", "./a"] {
            assert!(!is_plain(bad), "{bad}");
        }
    }
}
