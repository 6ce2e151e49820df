//! What lies in a folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The files of a folder, by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

pub(crate) fn contents(folder: &Path) -> Files {
    let entry = |e: std::io::Result<fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())
    };
    fs::read_dir(folder).unwrap().map(entry).collect()
}
