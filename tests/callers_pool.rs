//! A run inside a caller's rayon pool stays out of the global pool. A program of its own, because
//! there is one global pool in a process.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::path::Path;

use mcsmoe::pipeline::{Calibration, Keep, Recipe, merge_then_compress};
use rayon::ThreadPoolBuilder;

#[test]
fn a_whole_run_inside_a_pool_never_starts_the_global_one() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let dir = tempfile::tempdir().unwrap();
    let text = Calibration::text(fixtures.join("text/calib"), 64, 512, 7);
    let recipe = Recipe::preset("fast", Keep::Fraction(0.5)).unwrap();
    let (source, target) = (fixtures.join("mixtral-8e"), dir.path().join("target"));
    let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| merge_then_compress(&source, text, &target, &recipe)).unwrap();
    assert!(target.join("config.json").is_file());
    // Fails once anything has used the global pool.
    ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
}
