//! What several tests share: data, readers and writers that owe nothing to the library's own.

pub(crate) mod backends;
pub(crate) mod checkpoints;
pub(crate) mod files;
pub(crate) mod golden;
pub(crate) mod layers;
pub(crate) mod numbers;
pub(crate) mod sparse_models;
pub(crate) mod weights;

use std::path::{Path, PathBuf};

/// A file or a folder of `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The bundled texts for evaluation, without those for calibration, as one path.
pub(crate) fn evaluation_texts() -> PathBuf {
    let [legal, python] = ["text/legal.txt", "text/python.txt"].map(fixture);
    format!("{},{}", legal.display(), python.display()).into()
}

/// Name of the test `child` of a module, for the processes that it starts of this program.
pub(crate) fn child_of(module: &str) -> String {
    let (_program, path) = module.split_once("::").unwrap();
    format!("{path}::child")
}
