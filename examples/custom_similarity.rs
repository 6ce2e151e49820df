//! A metric of one's own beside the built-in stages: experts are alike when the norms of their
//! down projections are. Runs on layers in memory.
//!
//! ```text
//! cargo run --release --example custom_similarity
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::Path;

use mcsmoe::align::{Reference, WeightMatching};
use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::group::Dominant;
use mcsmoe::merge::Weighted;
use mcsmoe::model::SimilarityMatrix;
use mcsmoe::pipeline::{AlignWhen, Keep, Pipeline};
use mcsmoe::stage::{Context, LayerView, Needs, Similarity, Stage};

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
    fn similarity(&self, layer: &LayerView<'_>, _: &Context) -> mcsmoe::Result<SimilarityMatrix> {
        let norm = |e: &mcsmoe::model::Expert| {
            e.view().down.weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt()
        };
        let norms: Vec<f64> = layer.experts(self.name())?.iter().map(norm).collect();
        SimilarityMatrix::from_pairs(norms.len(), |i, j| {
            let distance = (norms[i] - norms[j]).abs();
            Ok((1.0 / (1.0 + distance), distance))
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let checkpoint = Checkpoint::open(fixtures.join("mixtral-8e"))?;
    let stats = StatsFile::open(fixtures.join("mixtral-8e.stats.safetensors"))?;

    let pipeline = Pipeline::builder()
        .similarity(DownNorm)
        .grouper(Dominant::default())
        .align(WeightMatching::default(), Reference::Dominant, AlignWhen::InGroups)
        .merger(Weighted::default())
        .keep(Keep::Experts(4))
        .build()?;

    let ids: Vec<_> = checkpoint.layers().iter().map(|l| l.id).collect();
    let read = |id: &_| checkpoint.read_layer(*id);
    let layers = ids.iter().map(read).collect::<mcsmoe::Result<Vec<_>>>()?;
    let needs = pipeline.needs() | Needs::SAMPLES;
    let observed = |id: &_| stats.layer(id, needs);
    let stats = ids.iter().map(observed).collect::<mcsmoe::Result<Vec<_>>>()?;
    let merged = pipeline.run().in_memory(&layers, &stats)?;

    for layer in &merged.report.layers {
        let error = layer.output_error.map_or(0.0, |e| 100.0 * e.mapped);
        println!("{}: {} experts, output error {error:.1}%", layer.layer, layer.experts.after);
    }
    let experts: usize = merged.layers.iter().map(|l| l.experts.len()).sum();
    assert_eq!(experts, 4 * layers.len(), "the budget is met exactly");
    Ok(())
}
