//! Whether a statistics file and this crate's reading of a checkpoint agree: for each layer the
//! relative error of the experts' sum, routed by the checkpoint's rule, on the file's samples.
//! Prints JSON (`tools/sweep_families.py`).
//!
//! ```text
//! cargo run --release --example routed                      # the bundled checkpoint and file
//! cargo run --release --example routed -- MODEL STATS
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::{Path, PathBuf};

use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::linalg::Cpu;
use mcsmoe::stage::Needs;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let args: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    match &args[..] {
        [] => {
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
            let (model, stats) = ("mixtral-8e", "mixtral-8e.stats.safetensors");
            let worst = worst(&fixtures.join(model), &fixtures.join(stats))?;
            assert!(worst < 1e-3, "{worst}");
            Ok(())
        }
        [model, stats] => worst(model, stats).map(drop),
        _ => Err("usage: routed [MODEL STATS]".into()),
    }
}

fn worst(model: &Path, stats: &Path) -> Outcome<f64> {
    let (model, file) = (Checkpoint::open(model)?, StatsFile::open(stats)?);
    let (mut errors, mut worst) = (serde_json::Map::new(), 0.0f64);
    for info in model.layers() {
        let found = file.layer(&info.id, Needs::SAMPLES)?;
        let samples = found.samples.ok_or("the file has no samples")?;
        let expected = samples.routed_output.ok_or("the file has no routed_output")?;
        let output =
            model.read_layer(info.id)?.routed_output(samples.inputs.view(), &Cpu::new())?;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let apart: f64 = output.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let whole: f64 = expected.iter().map(|b| square(*b)).sum();
        let error = (apart / whole).sqrt();
        worst = worst.max(error);
        errors.insert(info.id.to_string(), error.into());
    }
    println!("{}", serde_json::Value::Object(errors));
    Ok(worst)
}
