//! A target size: met, or refused with the least that can be reached.

use std::path::Path;

use crate::support::{evaluation_texts, fixture};
use mcsmoe::Result;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::decompose::{LowRank, PerMatrix};
use mcsmoe::pipeline::{
    CalibrateOptions, Calibration, CompressChoice, EvaluateOptions, ExportChoice, Keep, Recipe,
    Report, Tokens, calibrate, evaluate, merge_then_compress,
};
use mcsmoe::stage::{Needs, Portion, Size, SizeBudget};

fn recipe(keep: usize, size: Size, of: Portion) -> Recipe {
    let mut recipe = Recipe::preset("mc-smoe-budget", Keep::Experts(keep)).unwrap();
    recipe.compress = Some(CompressChoice::Size { size, of, least_rank: 1 });
    recipe
}

fn run(recipe: &Recipe, target: &Path) -> Result<Report> {
    let stats = fixture("mixtral-8e.stats.safetensors");
    merge_then_compress(fixture("mixtral-8e"), stats, target, recipe)
}

fn expert_bytes(folder: &Path) -> u64 {
    Checkpoint::open(folder).unwrap().layers().iter().map(|l| l.expert_bytes).sum()
}

#[test]
fn every_target_is_met_from_below_within_one_percent() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let (experts, whole) = (expert_bytes(&fixture("mixtral-8e")), source.total_bytes());
    for (i, (keep, size, of, target)) in [
        (4, Size::Percent(20.0), Portion::Experts, experts / 5),
        (8, Size::Percent(20.0), Portion::Experts, experts / 5),
        (4, Size::Bytes(experts / 3), Portion::Experts, experts / 3),
        (4, Size::Percent(50.0), Portion::Model, whole / 2),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = dir.path().join(i.to_string());
        let report = run(&recipe(keep, size, of), &folder).unwrap();
        let found = match of {
            Portion::Experts => expert_bytes(&folder),
            Portion::Model => Checkpoint::open(&folder).unwrap().total_bytes(),
        };
        assert!(found <= target && found as f64 >= 0.99 * target as f64, "{found} of {target}");
        let written = report.written.unwrap();
        assert_eq!(written.expert_bytes.after, expert_bytes(&folder));
        let counted = report.compression.unwrap().parameters.after;
        assert_eq!(2 * counted, written.expert_bytes.after, "two bytes a number, no rows kept");
    }
}

#[test]
fn whatever_fits_is_left_whole() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("whole");
    run(&recipe(4, Size::Percent(60.0), Portion::Experts), &folder).unwrap();
    let plain = dir.path().join("plain");
    let merged = Recipe::preset("m-smoe", Keep::Experts(4)).unwrap();
    run(&merged.export(ExportChoice::Native), &plain).unwrap();
    assert_eq!(expert_bytes(&folder), expert_bytes(&plain));
    let options = EvaluateOptions { max_windows: 1, ..EvaluateOptions::default() };
    let of = |folder: &Path| evaluate(folder, &evaluation_texts(), &options).unwrap().score.nll;
    assert_eq!(of(&folder), of(&plain));
}

#[test]
fn recovery_on_text_leaves_the_ranks_to_the_same_samples() {
    let dir = tempfile::tempdir().unwrap();
    let window = |w: u32| (0..64).map(|i| (i * i * 17 + i * 5 + w * 131) % 2048).collect();
    let tokens = Tokens::Windows((0..6).map(window).collect());
    let (source, stats) = (fixture("mixtral-8e"), dir.path().join("stats.safetensors"));
    let model = Checkpoint::open(&source).unwrap();
    let options = CalibrateOptions::default();
    calibrate(&model, &tokens, Needs::OBSERVABLE).options(options).write(&stats).unwrap();
    let fast = Recipe::preset("fast", Keep::Experts(6)).unwrap();
    let mut recipe = fast.export(ExportChoice::Native);
    recipe.compress =
        CompressChoice::Size { size: Size::Percent(20.0), of: Portion::Experts, least_rank: 1 }
            .into();
    let shapes = |calibration: Calibration, name: &str| {
        let folder = dir.path().join(name);
        merge_then_compress(&source, calibration, &folder, &recipe).unwrap();
        let folder = Checkpoint::open(&folder).unwrap();
        let shapes = folder.tensors().map(|(name, _, shape)| (name.to_owned(), shape.to_vec()));
        shapes.collect::<Vec<_>>()
    };
    let found = shapes(tokens.clone().into(), "text");
    assert!(found.iter().any(|(name, _)| name.contains("experts.5")));
    assert_eq!(found, shapes(stats.clone().into(), "statistics"));
}

#[test]
fn what_cannot_be_met_says_what_can() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    let error = run(&recipe(4, Size::Percent(0.5), Portion::Experts), &target).unwrap_err();
    // 4 layers of 4 experts of 3 matrices of rank 1: 2 bytes × (256 + 128).
    let (least, text) = (16 * 3 * 384 * 2, error.to_string());
    let least_is = format!("the least reachable size is {least} bytes, at rank 1 in every matrix");
    assert!(text.contains(&least_is), "{text}");
    assert!(!target.exists());
    // And it can.
    run(&recipe(4, Size::Bytes(least), Portion::Experts), &target).unwrap();
    assert_eq!(expert_bytes(&target), least);
}

#[test]
fn sizes_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    for (size, names) in [
        (Size::Percent(0.0), "percent of a size: expected a number in (0, 100]"),
        (Size::Percent(100.5), "percent of a size"),
        (Size::Percent(f64::NAN), "percent of a size"),
        (Size::Bytes(0), "size of a compression"),
    ] {
        let error = run(&recipe(4, size, Portion::Experts), &target).unwrap_err();
        assert!(error.to_string().contains(names), "{error}");
    }
    for export in [ExportChoice::Stock, ExportChoice::Expanded] {
        let recipe = recipe(4, Size::Percent(20.0), Portion::Experts).export(export);
        let error = run(&recipe, &target).unwrap_err();
        assert!(error.to_string().contains("native export"), "{error}");
    }
    let none = SizeBudget { least_rank: 0, ..SizeBudget::percent(20.0) };
    assert!(none.check().unwrap_err().to_string().contains("least rank"));
    assert!(!target.exists());
}

#[test]
fn in_memory_the_ranks_are_those_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let stats = mcsmoe::calibrate::StatsFile::open(fixture("mixtral-8e.stats.safetensors"));
    let stats = stats.unwrap();
    let recipe = recipe(4, Size::Percent(20.0), Portion::Experts);
    let pipeline = recipe.builder().unwrap();
    let compressor = PerMatrix::new(LowRank::default(), SizeBudget::percent(20.0));
    let pipeline = pipeline.compressor(compressor);
    let pipeline = pipeline.build().unwrap();
    let layers: Vec<_> = source.layers().iter().map(|l| source.read_layer(l.id).unwrap()).collect();
    let needs = pipeline.needs() | Needs::SAMPLES;
    let of = |l: &mcsmoe::model::MoeLayer| stats.layer(&l.id(), needs).unwrap();
    let stats: Vec<_> = layers.iter().map(of).collect();
    let found = pipeline.run().in_memory(&layers, &stats).unwrap().report.compression.unwrap();
    let folder = dir.path().join("native");
    let written = run(&recipe, &folder).unwrap().compression.unwrap();
    assert_eq!(found.parameters, written.parameters);
}

#[test]
fn recipes_name_it() {
    let toml = "preset = 'mc-smoe-budget'\nkeep = { experts = 4 }\n\
                compress = { method = 'size', size = { percent = 15 } }\n";
    let parsed = Recipe::from_toml(toml).unwrap();
    assert_eq!(parsed, recipe(4, Size::Percent(15.0), Portion::Experts));
    assert_eq!(Recipe::from_toml(&parsed.to_toml().unwrap()).unwrap(), parsed);
}
