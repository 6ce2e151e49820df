//! From text: half of the experts, fitted to what the layers gave, in a folder for any runtime.

#![allow(clippy::print_stdout)] // It is a command.

use mcsmoe::pipeline::{Calibration, ExportChoice, Keep, Recipe, merge_then_compress};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = "tests/fixtures/mixtral-8e";
    let text = Calibration::text("tests/fixtures/text/calib", 512, 16_384, 7);
    let recipe = Recipe::preset("fast", Keep::Fraction(0.5))?.export(ExportChoice::Stock);
    let target = tempfile::tempdir()?;
    let report = merge_then_compress(model, text, target.path().join("half"), &recipe)?;
    println!("{} → {} experts", report.experts.before, report.experts.after);
    assert_eq!(report.experts.after, 16);
    Ok(())
}
