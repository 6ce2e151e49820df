//! Whether a statistics file and this crate's reading of a checkpoint agree: for each layer the
//! relative error of the experts' sum, routed by the checkpoint's rule, on the file's samples.
//! Prints JSON (`tools/sweep_families.py`).

use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::linalg::Cpu;
use mcsmoe::stage::Needs;

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let [model, stats] = args else { return Err(USAGE.into()) };
    let (model, file) = (Checkpoint::open(model)?, StatsFile::open(stats)?);
    let mut errors = serde_json::Map::new();
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
        errors.insert(info.id.to_string(), error.into());
    }
    println!("{}", serde_json::Value::Object(errors));
    Ok(())
}
