//! The bundled checkpoint merged on a GPU and on the CPU: the same groups, and the same weights
//! within a rounding of `bf16`. Skipped without an adapter unless `MCSMOE_REQUIRE_GPU=1`.

#![allow(clippy::print_stderr)] // A skipped device is told.

use std::path::Path;
use std::sync::Arc;

use crate::support::fixture;
use crate::support::weights;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::gpu::{Gpu, Options};
use mcsmoe::linalg::{Compute, Cpu};
use mcsmoe::pipeline::{Calibration, ExportChoice, Keep, Output, Recipe, Report, Silent};

fn gpu() -> Option<Arc<dyn Compute>> {
    match Gpu::new() {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(e) => {
            let required = std::env::var("MCSMOE_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "MCSMOE_REQUIRE_GPU=1, but {e}");
            eprintln!("skipped on the GPU: {e}");
            None
        }
    }
}

fn merge(preset: &str, given: &Calibration, on: Arc<dyn Compute>, target: &Path) -> Report {
    let mut recipe = Recipe::preset(preset, Keep::Experts(4)).unwrap().export(ExportChoice::Native);
    recipe.measure_error = false;
    let pipeline = recipe.builder().unwrap().compute(on).build().unwrap();
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let output = Output::new(ExportChoice::Native);
    pipeline
        .run()
        .calibration(given.clone())
        .output(output)
        .observer(&Silent)
        .write(&source, target)
        .unwrap()
}

/// Merges on both devices and compares.
fn same(preset: &str, given: &Calibration) {
    let Some(gpu) = gpu() else { return };
    let name = gpu.name().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let (on_cpu, on_gpu) = (dir.path().join("cpu"), dir.path().join("gpu"));
    let expected = merge(preset, given, Arc::new(Cpu::new()), &on_cpu);
    let found = merge(preset, given, gpu, &on_gpu);
    assert_eq!((expected.device.as_str(), found.device), ("cpu", name));
    for (e, f) in expected.layers.iter().zip(&found.layers) {
        let groups = |r: &mcsmoe::pipeline::LayerReport| {
            r.groups.iter().map(|g| (g.dominant, g.members.clone())).collect::<Vec<_>>()
        };
        assert_eq!(groups(e), groups(f), "{preset}: {}", e.layer);
    }
    let (expected, found) = (weights::Folder::open(&on_cpu), weights::Folder::open(&on_gpu));
    assert_eq!(expected.tensors.len(), found.tensors.len());
    for (name, e) in &expected.tensors {
        // The sum differs in its last bits, so the stored value by one rounding at most.
        for (e, f) in e.iter().zip(&found.tensors[name]) {
            let tolerance = e.abs() * 2f32.powi(-7) + 1e-6;
            assert!((e - f).abs() <= tolerance, "{preset}: {name}: {e} {f}");
        }
    }
}

#[test]
fn a_context_on_the_preferred_card_names_it() {
    let Some(gpu) = gpu() else { return };
    let cx = mcsmoe::stage::Context::gpu(3).unwrap();
    assert_eq!((cx.compute().name(), cx.seed()), (gpu.name(), 3));
    let all = Gpu::adapters();
    assert!(all.iter().enumerate().all(|(i, a)| a.index == i && !a.name.is_empty()));
    assert!(all.iter().any(|a| gpu.name().starts_with(&a.name)));
    let by_name = Gpu::with(&Options::named(all[0].name.to_uppercase())).unwrap();
    assert!(by_name.name().starts_with(&all[0].name));
    let by_index = Gpu::with(&Options::index(0).block_bytes(1)).unwrap();
    assert_eq!(by_index.block_bytes(), 1024);
    // The journal of an interrupted run compares this.
    assert_eq!(format!("{by_index:?}"), format!("{:?}", by_index.clone()));
}

#[test]
fn the_papers_merge_from_statistics() {
    same("m-smoe", &fixture("mixtral-8e.stats.safetensors").into());
}

#[test]
fn the_papers_merge_from_text() {
    same("m-smoe", &Calibration::text(fixture("text/calib"), 128, 512, 7));
}
