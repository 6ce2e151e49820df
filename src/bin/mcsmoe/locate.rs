//! Where a model lies: its folder, a file in it, or its name on the Hugging Face hub if the local
//! cache has it. Nothing is downloaded.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder that an argument means; the argument itself where no rule applies, so that an error
/// names what was written.
pub(crate) fn model_folder(given: PathBuf) -> PathBuf {
    if given.is_file() {
        return match given.parent() {
            Some(folder) if folder.as_os_str().is_empty() => ".".into(),
            Some(folder) => folder.to_owned(),
            None => given,
        };
    }
    if given.exists() {
        return given;
    }
    caches().iter().find_map(|cache| cached(cache, &given)).unwrap_or(given)
}

/// The folders in which the hub's own tools keep models, in their order.
fn caches() -> Vec<PathBuf> {
    let folder =
        |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = folder("HOME").map(|home| home.join(".cache"));
    [
        folder("HF_HUB_CACHE"),
        folder("HF_HOME").map(|home| home.join("hub")),
        folder("XDG_CACHE_HOME").or(home).map(|cache| cache.join("huggingface/hub")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The newest snapshot of `ORGANISATION/MODEL` in a cache.
fn cached(cache: &Path, name: &Path) -> Option<PathBuf> {
    let (organisation, model) = name.to_str()?.split_once('/')?;
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains('/');
    if !plain(organisation) || !plain(model) {
        return None;
    }
    let folder = cache.join(format!("models--{organisation}--{model}"));
    let revision = fs::read_to_string(folder.join("refs/main")).ok()?;
    let snapshot = folder.join("snapshots").join(revision.trim());
    snapshot.is_dir().then_some(snapshot)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test fails by panicking.
    use super::*;

    #[test]
    fn a_name_on_the_hub_is_a_snapshot_of_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--name");
        let snapshot = folder.join("snapshots/abc");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), "abc\n").unwrap();
        assert_eq!(cached(cache.path(), Path::new("org/name")), Some(snapshot.clone()));
        for other in ["org/other", "org", "../name", "org/name/x", "/org/name"] {
            assert_eq!(cached(cache.path(), Path::new(other)), None, "{other}");
        }
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(model_folder(snapshot.join("config.json")), snapshot);
    }
}
