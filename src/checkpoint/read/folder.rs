//! Whether a path is the folder of a checkpoint, and where one is when it is not.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Locate, Result};

const FORMAT: &str = "checkpoint folder";

/// Checks that `dir` is a folder that holds a `config.json`.
///
/// # Errors
/// [`Format`](crate::ErrorKind::Format) with what to pass instead: for a file the folder that holds
/// it, for a folder of the hub's cache the snapshot in it, for an identifier of the hub that it is
/// to be downloaded; [`Io`](crate::ErrorKind::Io) when there is no such folder.
pub(super) fn check_folder(dir: &Path) -> Result<()> {
    if dir.is_file() {
        let reason = "it is a file; pass the folder that holds it and its config.json";
        return Err(Error::malformed(FORMAT, reason)).in_file(dir);
    }
    if !dir.is_dir() {
        return Err(absent(dir)).in_file(dir);
    }
    // A link to nothing is told where it is read.
    if dir.join("config.json").symlink_metadata().is_ok() {
        return Ok(());
    }
    let found = snapshots(dir);
    let pass = match &found[..] {
        [] => "it has no config.json".to_owned(),
        [one] => format!("it is a folder of the hub's cache; pass {}", one.display()),
        several => {
            let names: Vec<String> = several.iter().map(|p| p.display().to_string()).collect();
            format!("it is a folder of the hub's cache; pass one of {}", names.join(", "))
        }
    };
    Err(Error::malformed(FORMAT, pass)).in_file(dir)
}

fn absent(dir: &Path) -> Error {
    let parts: Vec<_> = dir.components().collect();
    let identifier = parts.len() == 2 && dir.is_relative();
    let reason = match (identifier, crate::tensor_file::dangling(dir)) {
        (_, Some(reason)) => reason,
        (true, None) => format!(
            "No such file or directory; if it is a model of the hub, download it first: \
             `hf download {0} --local-dir {0}`",
            dir.display()
        ),
        (false, None) => "No such file or directory".to_owned(),
    };
    Error::io("open", std::io::Error::new(std::io::ErrorKind::NotFound, reason))
}

/// The snapshots below a folder of the hub's cache, `models--{owner}--{name}`, its `snapshots`, or
/// the folder of them all; that of the branch `main` alone where it is recorded.
fn snapshots(dir: &Path) -> Vec<PathBuf> {
    let children = |dir: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten();
        let mut found: Vec<PathBuf> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| p.is_dir()).collect();
        found.sort();
        found
    };
    let in_repository = |repository: &Path| -> Vec<PathBuf> {
        let all = repository.join("snapshots");
        let main = fs::read_to_string(repository.join("refs/main")).ok();
        match main.map(|revision| all.join(revision.trim())).filter(|path| path.is_dir()) {
            Some(main) => vec![main],
            None => children(&all),
        }
    };
    let of_hub = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
    };
    let holds_config = |path: &PathBuf| path.join("config.json").symlink_metadata().is_ok();
    if dir.join("snapshots").is_dir() {
        return in_repository(dir);
    }
    if dir.file_name().is_some_and(|name| name == "snapshots") {
        return dir.parent().map(in_repository).unwrap_or_default();
    }
    let hub = if dir.join("hub").is_dir() { dir.join("hub") } else { dir.to_owned() };
    let repositories: Vec<PathBuf> = children(&hub).into_iter().filter(of_hub).collect();
    if repositories.is_empty() {
        // A download whose only folder holds the model.
        return children(dir).into_iter().filter(holds_config).collect();
    }
    repositories.iter().flat_map(|repository| in_repository(repository)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_hub_cache_say_what_to_pass() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("hub/models--a--b");
        let snapshot = repository.join("snapshots/abc0123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "abc0123\n").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        check_folder(&snapshot).unwrap();
        let hub = dir.path().join("hub");
        for other in [&repository, &repository.join("snapshots"), &hub, &dir.path().to_owned()] {
            let error = check_folder(other).unwrap_err().to_string();
            assert!(error.contains(&snapshot.display().to_string()), "{error}");
        }
        let error = check_folder(Path::new("a/b")).unwrap_err().to_string();
        assert!(error.contains("hf download a/b"), "{error}");
        let error = check_folder(&snapshot.join("config.json")).unwrap_err().to_string();
        assert!(error.contains("pass the folder"), "{error}");
    }
}
