//! A similarity of one's own in a whole run: experts are alike when the norms of their down
//! projections are.

#![allow(clippy::print_stdout)] // It is a command.

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::Calibration;
use mcsmoe::prelude::*;

#[derive(Debug)]
struct DownNorm;

impl Stage for DownNorm {
    fn name(&self) -> &str {
        "down-norm"
    }

    fn needs(&self) -> Needs {
        Needs::EXPERTS
    }
}

impl Similarity for DownNorm {
    fn similarity(&self, layer: &LayerView<'_>, _: &Context) -> Result<SimilarityMatrix> {
        let norm = |e: &Expert| e.view().down.weight.iter().map(|w| w * w).sum::<f32>().sqrt();
        let norms: Vec<f32> = layer.experts(self.name())?.iter().map(norm).collect();
        SimilarityMatrix::from_pairs(norms.len(), |i, j| {
            let distance = f64::from((norms[i] - norms[j]).abs());
            Ok((1.0 / (1.0 + distance), distance))
        })
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let source = Checkpoint::open("tests/fixtures/mixtral-8e")?;
    let text = Calibration::text("tests/fixtures/text/calib", 512, 4096, 7);
    let recipe = Recipe::preset("fast", Keep::Experts(4))?;
    let pipeline = recipe.builder()?.similarity(DownNorm).build()?;
    let target = tempfile::tempdir()?;
    let report = pipeline.run().calibration(text).write(&source, target.path().join("half"))?;
    println!("{:?}: {} → {} experts", report.stages, report.experts.before, report.experts.after);
    Ok(())
}
