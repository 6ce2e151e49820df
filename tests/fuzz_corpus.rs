//! The corpora of the fuzz targets, replayed: what fuzzing reached and found stays tested.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/lib.rs"]
mod targets;

use targets::{Ground, TARGETS, seeds};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn the_corpora_are_read_or_refused() {
    for (name, run) in TARGETS {
        let dir = tempfile::tempdir().unwrap();
        let ground = Ground::new(dir.path());
        let files = fs::read_dir(corpus(name)).unwrap().map(|entry| entry.unwrap().path());
        let files: BTreeSet<PathBuf> = files.collect();
        for file in &files {
            eprintln!("{}", file.display());
            run(&ground, &fs::read(file).unwrap());
        }
        assert!(!files.is_empty(), "no corpus of {name}");
    }
}

/// Writes the inputs that fuzzing starts from: `cargo test --test fuzz_corpus -- --ignored`.
#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_the_seeds() {
    let dir = tempfile::tempdir().unwrap();
    for (target, name, bytes) in seeds(&Ground::new(dir.path())) {
        fs::create_dir_all(corpus(target)).unwrap();
        fs::write(corpus(target).join(name), bytes).unwrap();
    }
}
