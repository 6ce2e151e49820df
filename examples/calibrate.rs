//! Runs text through a checkpoint, one layer in memory at a time, and writes what its routers and
//! experts did: a statistics file (docs/STATISTICS.md), and how long every layer took.
//!
//! ```text
//! cargo run --release --example calibrate                     # the bundled checkpoint and text
//! cargo run --release --example calibrate -- MODEL TEXT STATS [MAX_TOKENS [PRESET]]
//! ```
//!
//! TEXT is a `.txt` or `.jsonl` file, token ids in a safetensors file, or a folder of these.
//! Without PRESET everything that can be observed is collected, with it what its recipe needs.

#![allow(clippy::print_stdout)] // It is a command.

use std::path::Path;
use std::time::Instant;

use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::Stack;
use mcsmoe::pipeline::{CalibrateOptions, Keep, Recipe, Tokens, calibrate_to_file};
use mcsmoe::stage::Needs;

const MAX_TOKENS: usize = 16_384;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [] => {
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
            let (model, text) = (fixtures.join("mixtral-8e"), fixtures.join("text/calib"));
            let target = std::env::temp_dir().join("mcsmoe-example.stats.safetensors");
            run(&model, &text, &target, 4096, Needs::OBSERVABLE)
        }
        [model, text, target, rest @ ..] if rest.len() < 3 => {
            let most = rest.first().map_or(Ok(MAX_TOKENS), |n| n.parse())?;
            let needs = match rest.get(1) {
                None => Needs::OBSERVABLE,
                Some(preset) => needs(preset)?,
            };
            run(model.as_ref(), text.as_ref(), target.as_ref(), most, needs)
        }
        _ => Err("usage: calibrate [MODEL TEXT STATS [MAX_TOKENS [PRESET]]]".into()),
    }
}

/// What the stages of a preset need, and samples to measure output errors on.
fn needs(preset: &str) -> mcsmoe::Result<Needs> {
    let recipe = Recipe::preset(preset, Keep::Fraction(0.5))?;
    Ok(recipe.builder()?.build()?.needs() | Needs::SAMPLES)
}

fn run(
    model: &Path,
    text: &Path,
    target: &Path,
    most: usize,
    needs: Needs,
) -> Result<(), Box<dyn std::error::Error>> {
    let model = Checkpoint::open(model)?;
    let tokens = Tokens::read(&model, text, None, most, 7)?;
    let read = tokens.of(Stack::Causal);
    let start = Instant::now();
    calibrate_to_file(&model, &tokens, needs, &CalibrateOptions::default(), target)?;
    let (seconds, layers) = (start.elapsed().as_secs_f64(), model.layers().len());
    let (per_layer, rate) = (seconds / layers as f64, read as f64 * layers as f64 / seconds);
    println!("{read} tokens, {layers} MoE layers: {seconds:.2} s");
    println!("{per_layer:.3} s per layer, {rate:.0} tokens per second and layer");
    let stats = StatsFile::open(target)?;
    assert_eq!(stats.layers().len(), layers, "every MoE layer has its statistics");
    println!("{}: {} bytes", target.display(), std::fs::metadata(target)?.len());
    Ok(())
}
