//! The files of a checkpoint that are not weights and travel with it: tokenizer, chat templates,
//! code, processors, licences.

use std::fs;
use std::path::Path;

use crate::checkpoint::read::shards::INDEX;
use crate::error::{Error, Locate, Result};
use crate::tensor_file::dangling;

/// Endings of weights in any format, and of their indexes.
const WEIGHTS: &[&str] = &[
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".npy",
    ".ot",
    ".tflite",
    ".distcp",
    ".index.json",
];
/// Endings of what tools leave behind.
const LEFTOVERS: &[&str] =
    &[".pyc", ".log", ".out", ".lock", ".tmp", ".bak", ".incomplete", ".partial", ".swp", "~"];
/// Written anew, or about another model.
const REPLACED: &[&str] = &["config.json", super::request::MANIFEST, "README.md", INDEX];
/// Folders of caches.
const CACHES: &[&str] = &["__pycache__", "wandb", "runs", "logs"];

/// The files of `dir` that travel, as paths relative to it with `/`, sorted. Files of a subfolder
/// travel too, unless it holds weights or a `config.json` of its own, which is another model.
///
/// # Errors
/// [`Io`](crate::ErrorKind::Io), also for a link to nothing;
/// [`Format`](crate::ErrorKind::Format) for a name that is not UTF-8.
pub(in crate::checkpoint) fn companion_files(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    collect(dir, "", &mut found)?;
    found.sort_unstable();
    Ok(found)
}

/// Adds the files of a folder whose path below the checkpoint's is `prefix`.
fn collect(dir: &Path, prefix: &str, found: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(list).in_file(dir)? {
        let path = entry.map_err(list).in_file(dir)?.path();
        let Some(name) = path.file_name().unwrap_or_default().to_str() else {
            let reason = "its name is not UTF-8: rename or remove it";
            return Err(Error::malformed("checkpoint folder", reason)).in_file(&path);
        };
        if name.starts_with('.') || ends(name, WEIGHTS) || ends(name, LEFTOVERS) {
            continue;
        }
        if prefix.is_empty() && REPLACED.contains(&name) {
            continue;
        }
        if let Some(reason) = dangling(&path) {
            let missing = std::io::Error::new(std::io::ErrorKind::NotFound, reason);
            return Err(Error::io("copy", missing)).in_file(&path);
        }
        // Follows links, which is how hub caches store files.
        if path.is_file() {
            found.push(format!("{prefix}{name}"));
        } else if path.is_dir() && !CACHES.contains(&name) && !is_model(&path)? {
            collect(&path, &format!("{prefix}{name}/"), found)?;
        }
    }
    Ok(())
}

fn list(error: std::io::Error) -> Error {
    Error::io("list folder", error)
}

fn ends(name: &str, endings: &[&str]) -> bool {
    endings.iter().any(|ending| name.ends_with(ending))
}

/// Whether a subfolder is a model of its own: it holds a config or, at any depth, weights.
fn is_model(dir: &Path) -> Result<bool> {
    for entry in fs::read_dir(dir).map_err(list).in_file(dir)? {
        let path = entry.map_err(list).in_file(dir)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let weights = ends(&name, WEIGHTS) || name == "config.json";
        // A link to a folder could lead back here.
        let nested = path.is_dir() && !path.is_symlink();
        if weights || nested && is_model(&path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_weights_caches_and_leftovers_travels() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        };
        let travel = [
            "LICENSE",
            "additional_chat_templates/tool.jinja",
            "dict.txt",
            "encoding/util.py",
            "modelling_odd.py",
            "odd_utils.py",
            "params.json",
            "tekken.json",
            "tokenizer.json",
            "video_preprocessor_config.json",
        ];
        travel.into_iter().for_each(put);
        for stays in [
            "model.safetensors",
            "model.safetensors.index.json",
            "model.safetensors.index.json.bak",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
            "original/params.json",
            "draft/config.json",
            "README.md",
            "config.json",
            "mcsmoe.json",
            "nohup.out",
            ".DS_Store",
            ".cache/huggingface/x",
            "__pycache__/odd_utils.cpython-312.pyc",
        ] {
            put(stays);
        }
        assert_eq!(companion_files(dir.path()).unwrap(), travel);
    }

    #[test]
    #[cfg(unix)]
    fn links_to_nothing_matter_only_where_they_would_travel() {
        let dir = tempfile::tempdir().unwrap();
        let link = |name: &str| {
            std::os::unix::fs::symlink("../blobs/1", dir.path().join(name)).unwrap();
        };
        ["consolidated.safetensors", "README.md", "pytorch_model.bin"].into_iter().for_each(link);
        assert!(companion_files(dir.path()).unwrap().is_empty());
        link("generation_config.json");
        let error = companion_files(dir.path()).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains("blobs/1"), "{error}");
    }
}
