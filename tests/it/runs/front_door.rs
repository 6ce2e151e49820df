//! One call from a checkpoint to a smaller one: a path is enough for any kind of calibration.

use std::path::Path;

use mcsmoe::pipeline::{Calibration, Keep, Recipe, merge_then_compress};

use crate::support::files::contents;
use crate::support::fixture;

fn weights(calibration: impl Into<Calibration>, target: &Path) -> Vec<u8> {
    let recipe = Recipe::preset("fast", Keep::Fraction(0.5)).unwrap();
    merge_then_compress(fixture("mixtral-8e"), calibration, target, &recipe).unwrap();
    contents(target)["model.safetensors"].clone()
}

#[test]
fn a_path_is_text_ids_or_statistics_by_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let text = fixture("text/calib");
    let by_path = weights(&text, &dir.path().join("path"));
    let options = Calibration::text_options();
    let given = Calibration::Text { path: text, options };
    assert_eq!(by_path, weights(given, &dir.path().join("text")));

    let stats = fixture("mixtral-8e.stats.safetensors");
    let by_path = weights(&stats, &dir.path().join("from-stats"));
    let given = Calibration::Statistics(stats);
    assert_eq!(by_path, weights(given, &dir.path().join("given-stats")));

    let none = merge_then_compress(
        fixture("mixtral-8e"),
        "no/such/path",
        dir.path().join("none"),
        &Recipe::preset("fast", Keep::Fraction(0.5)).unwrap(),
    );
    assert!(none.unwrap_err().to_string().contains("no/such/path"));
}
