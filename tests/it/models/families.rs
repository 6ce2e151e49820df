//! Families with layers of several kinds, from tokens to a folder.

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Causal;
use mcsmoe::pipeline::{Calibration, Keep, Recipe, Tokens, merge_then_compress};
use mcsmoe::stage::Context;

use crate::support::fixture;

const NAMES: [&str; 5] = ["qwen3-next", "qwen3.5-moe", "gpt-oss", "glm-5", "exaone-moe"];

fn open(folder: &std::path::Path) -> Causal<Checkpoint> {
    Causal::open(Checkpoint::open(folder).unwrap(), Context::cpu(0)).unwrap()
}

fn text() -> Calibration {
    let window = |w: u32| (0..20).map(|i| (i * i * 17 + i * 5 + w * 131) % 29 + 3).collect();
    Calibration::from(Tokens::Windows((0..48).map(window).collect()))
}

#[test]
fn fast_and_balanced_write_folders_that_run() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        for preset in ["fast", "balanced"] {
            let recipe = Recipe::preset(preset, Keep::Experts(2)).unwrap();
            let target = dir.path().join(format!("{name}-{preset}"));
            let source = fixture(&format!("forward/{name}"));
            merge_then_compress(&source, text(), &target, &recipe)
                .unwrap_or_else(|error| panic!("{name}, {preset}: {error}"));
            let logits = open(&target).logits(&[3, 1, 4, 1, 5]).unwrap();
            assert_eq!(logits.dim(), (5, 32), "{name}, {preset}");
        }
    }
}

#[test]
fn where_every_expert_stays_the_logits_keep_their_bits() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let recipe = Recipe::preset("reap", Keep::Experts(4)).unwrap();
        let (source, target) = (fixture(&format!("forward/{name}")), dir.path().join(name));
        merge_then_compress(&source, text(), &target, &recipe)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let tokens: Vec<u32> = (0..20).map(|i| i * i % 31).collect();
        let [before, after] = [&source, &target].map(|f| open(f).logits(&tokens).unwrap());
        assert_eq!(before.mapv(f32::to_bits), after.mapv(f32::to_bits), "{name}");
    }
}
