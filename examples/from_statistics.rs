//! From routing statistics that were collected before: the paper's merge, without text.

#![allow(clippy::print_stdout)] // It is a command.

use std::path::Path;

use mcsmoe::pipeline::{Keep, Recipe, merge_then_compress};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = "tests/fixtures/mixtral-8e";
    let stats = Path::new("tests/fixtures/mixtral-8e.stats.safetensors");
    let recipe = Recipe::preset("m-smoe", Keep::Experts(4))?;
    let target = tempfile::tempdir()?;
    let report = merge_then_compress(model, stats, target.path().join("half"), &recipe)?;
    println!("{} → {} experts", report.experts.before, report.experts.after);
    Ok(())
}
