//! The target folder: written under another name and renamed when complete.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Locate, Result};

/// A target folder in the making: `<target>.partial`, removed when dropped unless it is to outlast
/// a failure.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    target: PathBuf,
    keep: bool,
}

fn refuse(reason: impl Into<String>, path: &Path) -> Error {
    let refusal: Result<()> = Err(ErrorKind::Target { reason: reason.into() }.into());
    match refusal.in_file(path) {
        Err(error) => error,
        Ok(()) => ErrorKind::Target { reason: String::new() }.into(),
    }
}

impl Partial {
    /// Checks that `target` may be written and creates `<target>.partial` beside it.
    ///
    /// # Errors
    /// [`ErrorKind::Target`] for a target that is the `source` folder, lies in it or holds
    /// anything, or a partial folder that another run left; [`ErrorKind::Io`].
    pub fn create(source: &Path, target: &Path) -> Result<Self> {
        let (target, path) = Self::places(target)?;
        check(source, &target)?;
        if path.symlink_metadata().is_ok() {
            let reason = "left by another run: resume it, or delete it if that run has ended";
            return Err(refuse(reason, &path));
        }
        fs::create_dir(&path).map_err(|e| Error::io("create folder", e)).in_file(&path)?;
        Ok(Self { path, target, keep: false })
    }

    /// As [`Partial::create`], but takes the folder that an interrupted run left. It outlasts a
    /// failure of this run too, so that another can go on.
    ///
    /// # Errors
    /// As [`Partial::create`], but for the partial folder.
    pub fn resume(source: &Path, target: &Path) -> Result<Self> {
        let (target, path) = Self::places(target)?;
        check(source, &target)?;
        match path.symlink_metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(refuse("it exists and is not a folder", &path)),
            Err(_) => {
                fs::create_dir(&path).map_err(|e| Error::io("create folder", e)).in_file(&path)?;
            }
        }
        Ok(Self { path, target, keep: true })
    }

    /// The target under its parent's real name, and the folder beside it.
    fn places(target: &Path) -> Result<(PathBuf, PathBuf)> {
        let target = resolve(target)?;
        let Some(name) = target.file_name() else {
            return Err(refuse("not the name of a folder", &target));
        };
        let mut name = name.to_owned();
        name.push(".partial");
        let path = target.with_file_name(name);
        Ok((target, path))
    }

    /// The folder to write to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder its name.
    pub(super) fn commit(mut self) -> Result<PathBuf> {
        sync_folder(&self.path);
        if self.target.exists() {
            // It was empty; if it no longer is, this fails and nothing is lost.
            let removed = fs::remove_dir(&self.target);
            removed.map_err(|e| Error::io("replace empty folder", e)).in_file(&self.target)?;
        }
        let renamed = fs::rename(&self.path, &self.target);
        renamed.map_err(|e| Error::io("rename to target", e)).in_file(&self.target)?;
        self.keep = true;
        self.target.parent().into_iter().for_each(sync_folder);
        Ok(self.target.clone())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing better can be done with a failure here; the folder's name tells what it is.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes a rename durable where folders can be synchronised at all.
fn sync_folder(path: &Path) {
    let _ = fs::File::open(path).and_then(|folder| folder.sync_all());
}

/// The target under its parent's real name.
fn resolve(target: &Path) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(refuse("not the name of a folder", target));
    };
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = parent.canonicalize().map_err(|e| Error::io("open parent folder", e));
    Ok(parent.in_file(target)?.join(name))
}

fn check(source: &Path, target: &Path) -> Result<()> {
    let source = source.canonicalize().map_err(|e| Error::io("open", e)).in_file(source)?;
    let real = target.canonicalize().unwrap_or_else(|_| target.to_owned());
    if real == source {
        return Err(refuse("it is the source", target));
    }
    if real.starts_with(&source) {
        return Err(refuse("it lies inside the source", target));
    }
    let Ok(metadata) = target.symlink_metadata() else { return Ok(()) };
    if !metadata.is_dir() {
        return Err(refuse("it exists and is not a folder", target));
    }
    let mut entries = fs::read_dir(target).map_err(|e| Error::io("list", e)).in_file(target)?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(refuse("it exists and is not empty", target)),
    }
}
