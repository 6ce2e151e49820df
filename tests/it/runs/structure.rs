//! Compressions by columns, by hidden units and around a shared base, through recipes.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::{evaluation_texts, fixture};
use mcsmoe::calibrate::{StatsFile, write_stats};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::{Expert, FactoredExpert, LayerId, Role, Structure, Weight};
use mcsmoe::pipeline::{
    AlignChoice, CompressChoice, EvaluateOptions, ExportChoice, Keep, Recipe, Report, evaluate,
    merge_then_compress,
};
use mcsmoe::stage::Needs;
use mcsmoe::{ErrorKind, Result};
use ndarray::Array2;

fn recipe(compress: Option<CompressChoice>, export: ExportChoice) -> Recipe {
    Recipe { compress, ..Recipe::preset("m-smoe", Keep::Experts(4)).unwrap().export(export) }
}

fn run(recipe: &Recipe, target: &Path) -> Result<Report> {
    let stats = fixture("mixtral-8e.stats.safetensors");
    merge_then_compress(fixture("mixtral-8e"), stats, target, recipe)
}

fn loss(folder: &Path) -> f64 {
    let options = EvaluateOptions { max_windows: 1, ..EvaluateOptions::default() };
    evaluate(folder, &evaluation_texts(), &options).unwrap().score.nll
}

fn neurons(keep: f64, rank: usize) -> Option<CompressChoice> {
    Some(CompressChoice::Neurons { keep, rank })
}

fn merged(folder: &Path) -> Vec<Expert> {
    let model = Checkpoint::open(folder).unwrap();
    let ids: Vec<LayerId> = model.layers().iter().map(|l| l.id).collect();
    ids.iter().flat_map(|id| model.read_merged(*id).unwrap().experts).collect()
}

fn factored(folder: &Path) -> Vec<FactoredExpert> {
    let model = Checkpoint::open(folder).unwrap();
    let ids: Vec<LayerId> = model.layers().iter().map(|l| l.id).collect();
    ids.iter().flat_map(|id| model.read_factored(*id).unwrap().unwrap().experts).collect()
}

fn weight(expert: &Expert, role: Role) -> Array2<f32> {
    expert.view().linear(role).unwrap().weight.to_owned()
}

#[test]
fn fewer_hidden_units_are_a_smaller_size_in_every_export() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    run(&recipe(None, ExportChoice::Native), &plain).unwrap();
    let whole = merged(&plain);
    let mut losses = Vec::new();
    for export in [ExportChoice::Stock, ExportChoice::Native, ExportChoice::Expanded] {
        let target = dir.path().join(format!("{export:?}"));
        let report = run(&recipe(neurons(0.35, 0), export), &target).unwrap();
        let model = Checkpoint::open(&target).unwrap();
        // ⌈0.35 · 256⌉ = 90, rounded up to a multiple of 8.
        assert!(model.layers().iter().all(|l| (l.d_ff, l.d_model) == (96, 128)));
        assert_eq!(model.config().integer("intermediate_size").unwrap(), Some(96));
        let found = report.compression.unwrap().parameters;
        assert_eq!(found.after * 256, found.before * 96);
        let written = report.written.unwrap();
        assert_eq!(written.tensor_bytes.after, model.total_bytes());
        let copies = if export == ExportChoice::Expanded { 2 } else { 1 };
        assert_eq!(written.expert_bytes.after, 2 * copies * found.after);
        losses.push(loss(&target));
    }
    assert!(losses.iter().all(|l| l.is_finite()), "{losses:?}");
    assert!((losses[1] - losses[2]).abs() < 1e-6, "one function: {losses:?}");
    // What is left is what was there, unit by unit.
    let small = merged(&dir.path().join("Native"));
    assert_eq!(small.len(), whole.len());
    for (small, whole) in small.iter().zip(&whole) {
        let (up, down) = (weight(small, Role::Up), weight(small, Role::Down));
        let all = (weight(whole, Role::Up), weight(whole, Role::Down));
        let mut from = 0;
        for (row, column) in up.rows().into_iter().zip(down.columns()) {
            let found = (from..256).find(|&a| all.0.row(a) == row && all.1.column(a) == column);
            from = found.expect("a unit of the whole expert, in order") + 1;
        }
    }
    let everything = dir.path().join("everything");
    run(&recipe(neurons(1.0, 0), ExportChoice::Native), &everything).unwrap();
    assert_eq!(merged(&everything), whole);
}

#[test]
fn kept_units_are_one_set_in_gate_up_and_down() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("native");
    let report = run(&recipe(neurons(0.1, 8), ExportChoice::Native), &target).unwrap();
    let found = factored(&target);
    for expert in &found {
        let of = |role: Role| match &expert.linear(role).unwrap().weight {
            Weight::Factored(factored) => factored.clone(),
            Weight::Dense(_) => panic!("{role} is dense"),
        };
        let (gate, up, down) = (of(Role::Gate), of(Role::Up), of(Role::Down));
        assert_eq!((gate.structure(), up.structure()), (Structure::Rows, Structure::Rows));
        assert_eq!(down.structure(), Structure::Columns);
        assert_eq!((up.indices().len(), up.rank(), down.rank()), (26, 8, 8));
        assert!(gate.indices() == up.indices() && up.indices() == down.indices());
    }
    let parameters: usize = found.iter().map(FactoredExpert::parameters).sum();
    assert_eq!(report.compression.unwrap().parameters.after, parameters as u64);
    let expanded = dir.path().join("expanded");
    run(&recipe(neurons(0.1, 8), ExportChoice::Expanded), &expanded).unwrap();
    // Factors rounded to bfloat16, or their product.
    assert!((loss(&target) - loss(&expanded)).abs() < 0.02);
}

#[test]
fn columns_stay_in_native_folders() {
    let dir = tempfile::tempdir().unwrap();
    let structure = Structure::Columns;
    for (name, compress) in [
        ("complement", CompressChoice::Complement { rank: 8, rows: 0.1, structure }),
        ("sparse", CompressChoice::Sparse { rows: 0.5, score: Default::default(), structure }),
    ] {
        let target = dir.path().join(name);
        let report = run(&recipe(Some(compress), ExportChoice::Native), &target).unwrap();
        let (found, dense) = (factored(&target), merged(&target));
        for (expert, dense) in found.iter().zip(&dense) {
            let Weight::Factored(down) = &expert.linear(Role::Down).unwrap().weight else {
                panic!("dense")
            };
            assert_eq!(down.structure(), structure);
            assert_eq!(down.kept().dim(), (128, if name == "sparse" { 128 } else { 26 }));
            let product = expert.to_expert(&mcsmoe::linalg::Cpu::new()).unwrap();
            approx::assert_abs_diff_eq!(
                weight(&product, Role::Down),
                weight(dense, Role::Down),
                epsilon = 1e-6
            );
        }
        let parameters: usize = found.iter().map(FactoredExpert::parameters).sum();
        assert_eq!(report.compression.unwrap().parameters.after, parameters as u64);
        assert!(loss(&target).is_finite());
    }
}

#[test]
fn a_shared_base_keeps_the_function_at_full_rank() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    run(&recipe(None, ExportChoice::Stock), &plain).unwrap();
    for shared_right in [false, true] {
        let shared = |rank| Some(CompressChoice::SharedBasis { rank, shared_right });
        let target = dir.path().join(format!("full-{shared_right}"));
        let full = run(&recipe(shared(128), ExportChoice::Stock), &target).unwrap();
        // A shared R of rank 128 spans all inputs of gate and up, but half of those of down.
        let off = (loss(&target) - loss(&plain)).abs();
        assert!(off < if shared_right { 0.5 } else { 0.02 }, "{off}");
        let target = dir.path().join(format!("low-{shared_right}"));
        let low = run(&recipe(shared(8), ExportChoice::Stock), &target).unwrap();
        let error = |r: &Report| -> f64 {
            r.layers.iter().map(|l| l.output_error.unwrap().narrowed.unwrap()).sum()
        };
        assert!(error(&low) > error(&full), "{} {}", error(&low), error(&full));
        // Four experts in each of four layers; m n + N r (m + n), or m n + r (N m + n).
        let (m, n, r) = (256, 128, 8);
        let of = |m: u64, n: u64| match shared_right {
            true => m * n + r * (4 * m + n),
            false => m * n + 4 * r * (m + n),
        };
        let expected = 4 * (2 * of(m, n) + of(n, m));
        assert_eq!(low.compression.unwrap().parameters.after, expected);
    }
    let native = recipe(Some(CompressChoice::SharedBasis { rank: 8, shared_right: false }), {
        ExportChoice::Native
    });
    let error = run(&native, &dir.path().join("native")).unwrap_err();
    assert!(error.to_string().contains("native folders hold no base"), "{error}");
}

/// A gradient by `up` that is zero but for the rows `10 e` and `10 e + 1` of expert `e`.
fn two_rows(e: usize, like: &Expert) -> Expert {
    let (mut gate, mut up, mut down) = like.clone().into_parts();
    let all = gate.iter_mut().chain([&mut up, &mut down]);
    all.for_each(|linear| linear.weight.fill(0.0));
    up.weight.slice_mut(ndarray::s![10 * e..10 * e + 2, ..]).fill(1.0);
    Expert::new(gate, up, down, like.view().activation).unwrap()
}

#[test]
fn gradients_of_all_members_choose_the_rows_of_a_merged_expert() {
    let dir = tempfile::tempdir().unwrap();
    let model = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let known = StatsFile::open(fixture("mixtral-8e.stats.safetensors")).unwrap();
    let with = |l: &mcsmoe::checkpoint::LayerInfo| {
        let mut stats = known.layer(&l.id, Needs::LOGIT_GRAM).unwrap();
        let experts = model.read_layer(l.id).unwrap();
        let gradients = experts.experts().iter().enumerate();
        stats.gradients = Some(gradients.map(|(e, like)| two_rows(e, like)).collect());
        (l.id, stats)
    };
    let layers: BTreeMap<LayerId, _> = model.layers().iter().map(with).collect();
    let stats = dir.path().join("stats.safetensors");
    write_stats(&stats, &layers, &BTreeMap::new()).unwrap();
    let structure = Structure::Rows;
    let compress = CompressChoice::LowRankSensitive { rank: 4, rows: 0.1, structure };
    let recipe =
        Recipe { align: AlignChoice::Identity, ..recipe(Some(compress), ExportChoice::Native) };
    let target = dir.path().join("native");
    let report = merge_then_compress(fixture("mixtral-8e"), stats, &target, &recipe).unwrap();
    assert!(report.stages.contains(&"compress low-rank-sensitive".to_owned()));
    let groups = report.layers.iter().flat_map(|l| &l.groups);
    for (group, expert) in groups.zip(factored(&target)) {
        let Weight::Factored(up) = &expert.linear(Role::Up).unwrap().weight else {
            panic!("dense")
        };
        assert_eq!(up.indices().len(), 26);
        for &member in &group.members {
            let rows = [10 * member as u32, 10 * member as u32 + 1];
            assert!(rows.iter().all(|row| up.indices().contains(row)), "{group:?}");
        }
    }
    // Without gradients it cannot be done.
    let error = run(&recipe, &dir.path().join("none")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
}

#[test]
fn bad_structure_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    for (compress, names) in [
        (neurons(0.0, 0), "share of kept rows"),
        (neurons(1.5, 0), "share of kept rows"),
        (neurons(f64::NAN, 4), "share of kept rows"),
        (neurons(0.5, 129), "rank"),
        (Some(CompressChoice::SharedBasis { rank: 0, shared_right: false }), "rank of a compress"),
        (Some(CompressChoice::SharedBasis { rank: 129, shared_right: false }), "rank"),
    ] {
        let error = run(&recipe(compress, ExportChoice::Stock), &target).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
        assert!(error.to_string().contains(names), "{error}");
    }
    let mut protected = recipe(neurons(0.5, 0), ExportChoice::Native);
    protected.constraints.protect_layers.insert(LayerId::causal(1));
    let error = run(&protected, &target).unwrap_err();
    assert!(error.to_string().contains("every MoE layer"), "{error}");
    assert!(!target.exists());
}

#[test]
fn recipes_name_them() {
    let text = "preset = 'm-smoe'\nkeep = { experts = 4 }\n";
    for (line, expected) in [
        ("{ method = 'neurons', keep = 0.5 }", neurons(0.5, 0)),
        ("{ method = 'neurons', keep = 0.1, rank = 4 }", neurons(0.1, 4)),
        (
            "{ method = 'shared-basis', rank = 4 }",
            Some(CompressChoice::SharedBasis { rank: 4, shared_right: false }),
        ),
        (
            "{ method = 'complement', rank = 4, structure = 'columns' }",
            Some(CompressChoice::Complement { rank: 4, rows: 0.1, structure: Structure::Columns }),
        ),
    ] {
        let recipe = Recipe::from_toml(&format!("{text}compress = {line}\n")).unwrap();
        assert_eq!(recipe.compress, expected);
        assert_eq!(Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap(), recipe);
    }
}
