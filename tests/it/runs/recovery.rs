//! Recovery through the whole pipeline, on the bundled checkpoint and text.

use std::path::Path;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{
    Calibration, EvaluateOptions, ExportChoice, Keep, Output, Recipe, RecoverChoice, RecoverOn,
    Report, Silent, Tokens, evaluate, merge_then_compress,
};
use mcsmoe::recover::{Distill, KnowledgeDistillation, LeastSquares, UnitScale};
use mcsmoe::{ErrorKind, Result};

use crate::support::files::contents;
use crate::support::{evaluation_texts, fixture};

fn text(tokens: usize) -> Calibration {
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let path = fixture("text/calib");
    Tokens::read(&source, &path, Some(128), tokens, 7).unwrap().into()
}

fn merge(preset: &str, export: ExportChoice, given: Calibration, target: &Path) -> Result<Report> {
    let recipe = Recipe::preset(preset, Keep::Experts(4))?.export(export);
    merge_then_compress(fixture("mixtral-8e"), given, target, &recipe)
}

fn loss(model: &Path) -> f64 {
    let options = EvaluateOptions { max_windows: 6, ..EvaluateOptions::default() };
    evaluate(model, &evaluation_texts(), &options).unwrap().score.nll
}

/// What the whole model loses, and how much more one pruned on 4,096 tokens does.
fn pruned(target: &Path) -> (f64, f64) {
    let full = loss(&fixture("mixtral-8e"));
    merge("reap", ExportChoice::Stock, text(4096), target).unwrap();
    (full, loss(target) - full)
}

#[test]
fn the_closed_form_halves_what_pruning_loses() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    let (full, pruned) = pruned(&of("reap"));
    for (name, export) in [("stock", ExportChoice::Stock), ("native", ExportChoice::Native)] {
        let report = merge("fast", export, text(4096), &of(name)).unwrap();
        let lost = loss(&of(name)) - full;
        assert!(pruned > 0.1 && lost < 0.5 * pruned, "{name}: {lost}, pruned {pruned}");
        let errors = report.layers.iter().map(|l| l.output_error.unwrap());
        for error in errors {
            let told = error.narrowed.unwrap_or(error.mapped);
            assert_eq!(error.narrowed.is_some(), export == ExportChoice::Stock);
            assert!(told > 0.0 && told < 0.4, "{told}");
        }
        assert!(report.stages.iter().any(|stage| stage.starts_with("recover ")));
    }
}

#[test]
fn either_target_and_either_stream_halves_what_pruning_loses() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    let (full, pruned) = pruned(&of("reap"));
    let mut found = Vec::new();
    for recover_on in [RecoverOn::SameInput, RecoverOn::OwnStream, RecoverOn::Original] {
        let recipe = Recipe::preset("fast", Keep::Experts(4)).unwrap().export(ExportChoice::Stock);
        let recipe = Recipe { recover_on, ..recipe };
        let target = of(&format!("{recover_on:?}"));
        merge_then_compress(fixture("mixtral-8e"), text(4096), &target, &recipe).unwrap();
        let lost = loss(&target) - full;
        assert!(lost < 0.5 * pruned, "{recover_on:?}: {lost}, pruned {pruned}");
        found.push(lost);
    }
    assert!(found[0] != found[1] && found[1] != found[2] && found[0] != found[2], "{found:?}");
}

#[test]
fn few_tokens_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    merge("reap", ExportChoice::Stock, text(256), &of("reap")).unwrap();
    merge("fast", ExportChoice::Stock, text(256), &of("fast")).unwrap();
    let (pruned, fitted) = (loss(&of("reap")), loss(&of("fast")));
    assert!(fitted < 1.02 * pruned, "{fitted}, pruned {pruned}");
}

#[test]
fn no_recoverer_harms_on_few_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, recover: Vec<RecoverChoice>| {
        let recipe = Recipe::preset("fast", Keep::Experts(4)).unwrap();
        let recipe = Recipe { recover, ..recipe.export(ExportChoice::Native) };
        let target = dir.path().join(name);
        merge_then_compress(fixture("mixtral-8e"), text(256), &target, &recipe).unwrap();
        loss(&target)
    };
    let bare = run("none", Vec::new());
    let lesson = Distill { epochs: 3, ..Distill::default() };
    let paper = KnowledgeDistillation { epochs: 3, ..KnowledgeDistillation::default() };
    let each: [(&str, RecoverChoice); 4] = [
        ("unit-scale", RecoverChoice::UnitScale(UnitScale::default())),
        ("least-squares", RecoverChoice::LeastSquares(LeastSquares::default())),
        ("distill", RecoverChoice::Distill(lesson)),
        ("paper", RecoverChoice::Paper(paper)),
    ];
    for (name, recoverer) in each {
        let found = run(name, vec![recoverer]);
        assert!(found < 1.02 * bare, "{name}: {found}, unrecovered {bare}");
    }
}

#[test]
fn measured_removals_spread_a_budget_over_layers() {
    let dir = tempfile::tempdir().unwrap();
    let toml = "preset = \"fast\"\nexport = \"native\"\nkeep = { total = 16 }\nrecover = []\n\
        [group]\nmethod = \"removal\"\nspread = \"global\"\ntokens = 256\n";
    let recipe = Recipe::from_toml(toml).unwrap();
    let again = Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap();
    assert_eq!(again.group, recipe.group);
    let source = fixture("mixtral-8e");
    let target = dir.path().join("global");
    let report = merge_then_compress(&source, text(2048), &target, &recipe).unwrap();
    let kept: Vec<u64> = report.layers.iter().map(|l| l.experts.after).collect();
    assert_eq!(kept.iter().sum::<u64>(), 16);
    assert!(report.stages.contains(&"group removal".to_owned()));
    // As many experts by saliency, the same in every layer, leave more to recover.
    let fast = Recipe::preset("fast", Keep::Experts(4)).unwrap();
    let plain = Recipe { recover: Vec::new(), ..fast.export(ExportChoice::Native) };
    let target = dir.path().join("plain");
    let before = merge_then_compress(&source, text(2048), &target, &plain).unwrap();
    let error = |r: &Report| r.layers.iter().map(|l| l.output_error.unwrap().mapped).sum::<f64>();
    assert!(error(&report) < error(&before), "{} {}", error(&report), error(&before));
}

#[test]
fn the_samples_of_a_statistics_file_serve_too() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    let stats = || Calibration::from(fixture("mixtral-8e.stats.safetensors"));
    merge("reap", ExportChoice::Stock, stats(), &of("reap")).unwrap();
    merge("fast", ExportChoice::Stock, stats(), &of("fast")).unwrap();
    assert!(loss(&of("fast")) < loss(&of("reap")));
}

#[test]
fn distillation_has_the_same_bytes_at_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let fast = Recipe::preset("fast", Keep::Experts(4)).unwrap();
    let mut recipe = fast.export(ExportChoice::Native);
    let lesson = Distill { epochs: 1, ..Distill::default() };
    recipe.recover.push(RecoverChoice::Distill(lesson));
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let pipeline = recipe.builder().unwrap().build().unwrap();
    let output = Output::new(ExportChoice::Native);
    let run = |threads: usize, name: &str| {
        let target = dir.path().join(name);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let given = text(1024);
        let run = || {
            pipeline
                .run()
                .calibration(given.clone())
                .output(output)
                .observer(&Silent)
                .write(&source, &target)
        };
        pool.install(run).unwrap();
        contents(&target)
    };
    let one = run(1, "one");
    assert!(one.contains_key("mcsmoe.json") && run(2, "two") == one);
}

#[test]
fn a_recipe_names_its_recoverers() {
    let toml = "preset = \"fast\"\nexport = \"stock\"\n[keep]\nexperts = 4\n\
        [[recover]]\nmethod = \"distill\"\nepochs = 3\n";
    let recipe = Recipe::from_toml(toml).unwrap();
    let expected = Distill { epochs: 3, ..Distill::default() };
    assert_eq!(recipe.recover, [RecoverChoice::Distill(expected)]);
    assert_eq!(Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap(), recipe);
    let wrong = Recipe::from_toml(&toml.replace("distill", "prayer")).unwrap_err();
    assert!(matches!(wrong.kind(), ErrorKind::Recipe { .. }), "{wrong}");
}
