//! The sources of a text: the file itself, or what lies in a folder.

use std::fs;
use std::path::{Path, PathBuf};

use super::format::{Format, SUPPORTED};
use crate::error::{Error, ErrorKind, Locate, Result};

/// More files of a folder than this are documents of one collection, not sources of their own.
const MOST_SOURCES: usize = 256;
/// Folders in folders; deeper ones are most often links in a circle.
const MOST_DEPTH: usize = 32;

/// A file or a folder of files, whose windows are counted together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::calibrate::text) struct Source {
    /// The file's name without its endings, or the folder's name.
    pub(in crate::calibrate::text) name: String,
    /// In order of their names.
    pub(in crate::calibrate::text) files: Vec<TextPath>,
}

/// A file of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::calibrate::text) struct TextPath {
    pub(in crate::calibrate::text) path: PathBuf,
    /// Its name; of a file in a folder its path from there.
    pub(in crate::calibrate::text) name: String,
    pub(in crate::calibrate::text) format: Format,
}

/// What lies at a path.
#[derive(Debug, Default)]
pub(in crate::calibrate::text) struct Found {
    pub(in crate::calibrate::text) sources: Vec<Source>,
    /// Names of files of another kind.
    pub(in crate::calibrate::text) not_read: Vec<String>,
}

/// The sources at a path: a file is one; of a folder every text file and every subfolder with text
/// files is one, in order of their names. Where nothing lies, commas separate several paths, each
/// of them one source.
///
/// # Errors
/// [`ErrorKind::Io`]; [`ErrorKind::Unsupported`] for a file of another kind or a folder without
/// text files. Each names the path.
pub(in crate::calibrate::text) fn sources(path: &Path) -> Result<Found> {
    let several = path.to_str().filter(|text| text.contains(',') && !path.exists());
    let Some(several) = several else { return at(path) };
    let mut all = Found::default();
    for part in several.split(',') {
        let path = Path::new(part);
        let found = at(path)?;
        all.not_read.extend(found.not_read);
        if path.is_dir() {
            let files = found.sources.into_iter().flat_map(|source| source.files).collect();
            all.sources.push(Source { name: file_name(path), files });
        } else {
            all.sources.extend(found.sources);
        }
    }
    distinct(&mut all.sources);
    Ok(all)
}

fn at(path: &Path) -> Result<Found> {
    let data = fs::metadata(path).map_err(|e| Error::io("read text", e)).in_file(path)?;
    if !data.is_dir() {
        let format = Format::of(path).in_file(path)?;
        let file = TextPath { path: path.to_owned(), name: file_name(path), format };
        return Ok(Found { sources: vec![Source::of(file)], not_read: Vec::new() });
    }
    let mut found = Found::default();
    for entry in entries(path)? {
        let name = file_name(&entry);
        if entry.is_dir() {
            let mut files = Vec::new();
            walk(&entry, &name, 1, &mut files, &mut found.not_read)?;
            if !files.is_empty() {
                found.sources.push(Source { name, files });
            }
        } else {
            match Format::of_name(&entry) {
                Some(format) => {
                    found.sources.push(Source::of(TextPath { path: entry, name, format }));
                }
                None => found.not_read.push(name),
            }
        }
    }
    if found.sources.is_empty() {
        let (what, found) = ("text", "a folder without any".into());
        let supported = format!("at least one of {SUPPORTED}");
        return Err(ErrorKind::Unsupported { what, found, supported }.into()).in_file(path);
    }
    if found.sources.len() > MOST_SOURCES {
        let files = found.sources.drain(..).flat_map(|source| source.files).collect();
        found.sources.push(Source { name: file_name(path), files });
    }
    distinct(&mut found.sources);
    Ok(found)
}

/// Names of sources that several have get their endings back.
fn distinct(sources: &mut [Source]) {
    let names: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
    for source in sources {
        let twice = names.iter().filter(|name| **name == source.name).count() > 1;
        if let ([file], true) = (&source.files[..], twice) {
            source.name.clone_from(&file.name);
        }
    }
}

impl Source {
    fn of(file: TextPath) -> Self {
        let mut name = Path::new(&file.name).with_extension("");
        if Format::of_name(&name).is_some() {
            name.set_extension("");
        }
        Self { name: name.to_string_lossy().into_owned(), files: vec![file] }
    }
}

/// All text files below a folder, in order of their paths.
fn walk(
    folder: &Path,
    prefix: &str,
    depth: usize,
    files: &mut Vec<TextPath>,
    not_read: &mut Vec<String>,
) -> Result<()> {
    if depth > MOST_DEPTH {
        let expected = format!("at most {MOST_DEPTH} folders in each other");
        let circle = Error::range("depth of text", expected, "more; links in a circle?");
        return Err(circle).in_file(folder);
    }
    for path in entries(folder)? {
        let name = format!("{prefix}/{}", file_name(&path));
        if path.is_dir() {
            walk(&path, &name, depth + 1, files, not_read)?;
        } else if let Some(format) = Format::of_name(&path) {
            files.push(TextPath { path, name, format });
        } else {
            not_read.push(name);
        }
    }
    Ok(())
}

/// What lies in a folder, in order of the names; hidden files are left out.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |e| Error::io("list text", e);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(io).in_file(folder)? {
        let path = entry.map_err(io).in_file(folder)?.path();
        if !file_name(&path).starts_with('.') {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_subfolders_are_sources_in_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("code/deep")).unwrap();
        for name in [
            "b.txt",
            "a.jsonl.gz",
            ".hidden.txt",
            "x.md",
            "code/2.txt",
            "code/deep/1.json",
            "a.txt",
        ] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let found = sources(dir.path()).unwrap();
        let names: Vec<&str> = found.sources.iter().map(|source| &*source.name).collect();
        assert_eq!(names, ["a.jsonl.gz", "a.txt", "b", "code"]);
        let files: Vec<&str> = found.sources[3].files.iter().map(|file| &*file.name).collect();
        assert_eq!(files, ["code/2.txt", "code/deep/1.json"]);
        assert_eq!(found.not_read, ["x.md"]);
        let part = |name: &str| dir.path().join(name).display().to_string();
        let list = format!("{},{}", part("code"), part("b.txt"));
        let names = sources(Path::new(&list)).unwrap().sources;
        assert_eq!(names.iter().map(|source| &*source.name).collect::<String>(), "codeb");
        let empty = tempfile::tempdir().unwrap();
        let error = sources(empty.path()).unwrap_err();
        assert!(error.to_string().contains("a folder without any"), "{error}");
    }
}
