//! Merge, then compress, on a trained checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mcsmoe::calibrate::write_stats;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::decompose::RowScore;
use mcsmoe::linalg::singular_values;
use mcsmoe::model::{Expert, LayerId, Role, RoutingStats, Structure};
use mcsmoe::pipeline::{
    Calibration, CompressChoice, EvaluateOptions, ExportChoice, Keep, LayerReport, Observer,
    Output, Recipe, Report, Silent, Tokens, evaluate, merge_then_compress,
};
use mcsmoe::{ErrorKind, Result};
use ndarray::Array2;

use crate::support::files::contents;
use crate::support::{evaluation_texts, fixture};

const MAGNITUDE: RowScore = RowScore::Magnitude;

fn recipe(compress: Option<CompressChoice>, keep: Keep, export: ExportChoice) -> Recipe {
    Recipe { compress, ..Recipe::preset("m-smoe", keep).unwrap().export(export) }
}

fn run(recipe: &Recipe, target: &Path) -> Result<Report> {
    let stats = fixture("mixtral-8e.stats.safetensors");
    merge_then_compress(fixture("mixtral-8e"), stats, target, recipe)
}

fn svd(rank: usize) -> Option<CompressChoice> {
    Some(CompressChoice::Svd { rank })
}

/// All matrices of all experts of a stock folder.
fn matrices(folder: &Path) -> Vec<(Role, Array2<f32>)> {
    let model = Checkpoint::open(folder).unwrap();
    let ids: Vec<LayerId> = model.layers().iter().map(|l| l.id).collect();
    let of =
        |e: &Expert| e.view().linears().map(|(r, l)| (r, l.weight.to_owned())).collect::<Vec<_>>();
    ids.iter()
        .flat_map(|id| {
            model.read_layer(*id).unwrap().experts().iter().flat_map(of).collect::<Vec<_>>()
        })
        .collect()
}

fn error_of(report: &Report) -> f64 {
    report.layers.iter().map(|l| l.output_error.unwrap().mapped).sum()
}

#[test]
fn every_export_of_the_preset_predicts_and_counts_its_factors() {
    let dir = tempfile::tempdir().unwrap();
    let options = EvaluateOptions { max_windows: 1, ..EvaluateOptions::default() };
    let mut scores = Vec::new();
    for (name, export) in [
        ("stock", ExportChoice::Stock),
        ("native", ExportChoice::Native),
        ("expanded", ExportChoice::Expanded),
    ] {
        let target = dir.path().join(name);
        let recipe = Recipe::preset("mc-smoe", Keep::Experts(4)).unwrap().export(export);
        let report = run(&recipe, &target).unwrap();
        assert!(report.stages.contains(&"compress low-rank-sparse".to_owned()));
        let merged: u64 = report.experts.after;
        // d_ff = 256, d_model = 128, rank 32, ⌈0.1 m⌉ rows: 26 of gate and up, 13 of down.
        let factored = 2 * (32 * 384 + 26 * 128) + (32 * 384 + 13 * 256);
        let found = report.compression.unwrap();
        assert_eq!(found.parameters.before, merged * 3 * 256 * 128);
        assert_eq!(found.parameters.after, merged * factored);
        assert_eq!(found.parameters.before, report.expert_parameters.after, "dense is written");
        for layer in &report.layers {
            let c = layer.compression.unwrap();
            assert_eq!(c.flops_per_token.before, layer.flops_per_token.after);
            let saved = c.flops_per_token.before - c.flops_per_token.after;
            assert_eq!(saved, 2 * 2 * (3 * 256 * 128 - factored));
            let rank = c.stable_rank;
            assert!(rank.original > 1.0 && rank.merged > 1.0 && rank.compressed > 1.0);
            assert!(rank.merging.abs() < 1.0 && rank.compressing.abs() < 1.0);
        }
        scores.push(evaluate(&target, &evaluation_texts(), &options).unwrap().score.perplexity);
    }
    assert!(scores.iter().all(|p| p.is_finite() && *p < 2048.0), "{scores:?}");
    // One function: factors rounded to bfloat16, or their product.
    assert!((scores[1] / scores[2] - 1.0).abs() < 1e-2, "{scores:?}");
}

#[test]
fn a_native_folder_holds_the_factors() {
    let dir = tempfile::tempdir().unwrap();
    for (name, choice, each) in [
        ("paper", "mc-smoe", 2 * (32 * 384 + 26 * 128) + (32 * 384 + 13 * 256)),
        ("svd", "svd", 3 * 8 * 384),
        ("sparse", "sparse", 2 * 128 * 128 + 64 * 256),
    ] {
        let compress = match choice {
            "svd" => svd(8),
            "sparse" => Some(CompressChoice::Sparse {
                rows: 0.5,
                score: MAGNITUDE,
                structure: Structure::Rows,
            }),
            _ => Recipe::preset("mc-smoe", Keep::Experts(4)).unwrap().compress,
        };
        let (native, expanded) = (dir.path().join(name), dir.path().join(format!("{name}-e")));
        let recipe = recipe(compress, Keep::Experts(4), ExportChoice::Native);
        let report = run(&recipe, &native).unwrap();
        run(&recipe.export(ExportChoice::Expanded), &expanded).unwrap();
        let (factors, copies) = (Checkpoint::open(&native).unwrap(), Checkpoint::open(expanded));
        let copies = copies.unwrap();
        let written = report.written.unwrap();
        let experts = report.experts.after;
        let bytes: u64 = factors.layers().iter().map(|l| l.expert_bytes).sum();
        let index = factors.tensors().filter(|(name, ..)| name.ends_with(".row_index"));
        let rows: u64 = index
            .map(|(_, dtype, shape)| {
                assert_eq!(dtype, "I32");
                shape[0] as u64
            })
            .sum();
        assert_eq!(bytes, experts * each * 2 + rows * 4, "{name}");
        assert_eq!(written.expert_bytes.after, bytes);
        assert_eq!(written.tensor_bytes.after, factors.total_bytes());
        assert_eq!(written.parameters.after, factors.total_parameters());
        let counted: u64 = factors.layers().iter().map(|l| l.expert_parameters).sum();
        assert_eq!(counted, experts * each);
        for layer in factors.layers() {
            assert_eq!((layer.d_ff, layer.d_model), (256, 128));
            let merged = factors.read_merged(layer.id).unwrap();
            let dense = copies.read_layer(layer.id).unwrap();
            for (i, label) in merged.grouping.labels().iter().enumerate() {
                let pair = [&merged.experts[label.unwrap()], &dense.experts()[i]];
                let [a, b] = pair.map(|e| e.view().down.weight.to_owned());
                let norm = |x: &Array2<f32>| x.iter().map(|x| x * x).sum::<f32>().sqrt();
                assert!(norm(&(&a - &b)) <= 0.01 * norm(&b), "{name} {i}");
            }
        }
    }
}

#[test]
fn damaged_factors_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("native");
    let recipe = Recipe::preset("mc-smoe", Keep::Experts(4)).unwrap();
    run(&recipe, &target).unwrap();
    let file = target.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let name = "model.layers.0.block_sparse_moe.experts.0.w2.weight.row_index";
    let index = parsed.tensor(name).unwrap().data();
    let at = index.as_ptr() as usize - whole.as_ptr() as usize;
    // A row beyond the matrix.
    let mut damaged = whole.clone();
    damaged[at..at + 4].fill(0x7f);
    fs::write(&file, &damaged).unwrap();
    let error = Checkpoint::open(&target).unwrap().read_merged(LayerId::causal(0)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
    assert!(error.to_string().contains("w2.weight.left"), "{error}");
    // A factor by another name.
    let mut damaged = whole.clone();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(whole[8..8 + header].to_vec()).unwrap();
    let renamed = text.replacen("experts.0.w2.weight.rows", "experts.0.w2.weight.rowz", 1);
    damaged[8..8 + header].copy_from_slice(renamed.as_bytes());
    fs::write(&file, &damaged).unwrap();
    let error = Checkpoint::open(&target).unwrap_err();
    assert!(error.to_string().contains("weight.rowz"), "{error}");
}

#[test]
fn an_interrupted_compression_goes_on_to_the_same_bytes() {
    struct Stop;
    impl Observer for Stop {
        fn layer_finished(&self, report: &LayerReport) {
            assert!(report.layer != LayerId::causal(2), "interrupted");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    for preset in ["mc-smoe", "mc-smoe-budget"] {
        let recipe = Recipe::preset(preset, Keep::Experts(4)).unwrap();
        let stats = Calibration::from(fixture("mixtral-8e.stats.safetensors"));
        let go = |name: &str, observer: &(dyn Observer + std::panic::RefUnwindSafe)| {
            let output = Output::new(ExportChoice::Native).resuming();
            let target = dir.path().join(format!("{preset}-{name}"));
            let pipeline = recipe.builder().unwrap().build().unwrap();
            let run = || {
                pipeline
                    .run()
                    .calibration(stats.clone())
                    .output(output)
                    .observer(observer)
                    .write(&source, &target)
            };
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
        };
        let whole = go("whole", &Silent).unwrap().unwrap();
        assert!(go("cut", &Stop).is_err());
        assert_eq!(go("cut", &Silent).unwrap().unwrap(), whole);
        let read = |name: &str| contents(&dir.path().join(format!("{preset}-{name}")));
        assert!(read("cut") == read("whole"));
    }
}

#[test]
fn what_is_written_has_the_rank_and_the_error_is_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, low) = (dir.path().join("plain"), dir.path().join("low"));
    // Every expert stays alone: those are compressed too.
    let keep = Keep::Fraction(1.0);
    let before = run(&recipe(None, keep, ExportChoice::Stock), &plain).unwrap();
    let after = run(&recipe(svd(8), keep, ExportChoice::Stock), &low).unwrap();
    assert!(before.compression.is_none() && error_of(&before) < 1e-9);
    assert!(error_of(&after) > 0.01);
    for (_, weight) in matrices(&low) {
        let sigma = singular_values(weight.view()).unwrap();
        assert!(sigma[7] > 0.02 * sigma[0], "rank 8");
        // bfloat16 moves every entry by up to 2⁻⁹ of itself.
        assert!(sigma[8] < 0.02 * sigma[0], "{} of {}", sigma[8], sigma[0]);
    }
    let rank = after.compression.unwrap().stable_rank;
    assert_eq!((rank.merging, rank.original), (0.0, rank.merged));
    assert!(rank.compressing < 0.0 && rank.compressed < 8.0);
}

#[test]
fn a_full_budget_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    run(&recipe(None, Keep::Experts(3), ExportChoice::Stock), &plain).unwrap();
    let expected = matrices(&plain);
    for (i, full) in [
        CompressChoice::LowRankSparse {
            rank: 4,
            rows: 1.0,
            score: MAGNITUDE,
            structure: Structure::Rows,
        },
        CompressChoice::Svd { rank: 128 },
        CompressChoice::WhitenedSvd { rank: 128 },
        CompressChoice::Sparse { rows: 1.0, score: MAGNITUDE, structure: Structure::Rows },
        CompressChoice::Complement { rank: 64, rows: 0.75, structure: Structure::Rows },
    ]
    .into_iter()
    .enumerate()
    {
        let target = dir.path().join(i.to_string());
        run(&recipe(Some(full), Keep::Experts(3), ExportChoice::Stock), &target).unwrap();
        for ((_, a), (role, b)) in expected.iter().zip(matrices(&target)) {
            let scale = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let off = a.iter().zip(&b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            // One rounding of bfloat16 apart.
            assert!(off <= scale / 128.0, "{full:?} {role}: {off} of {scale}");
        }
    }
}

#[test]
fn moments_of_the_routed_tokens_lower_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = |name: &str, compress| {
        let recipe = recipe(Some(compress), Keep::Experts(4), ExportChoice::Native);
        error_of(&run(&recipe, &dir.path().join(name)).unwrap())
    };
    let plain = error("svd", CompressChoice::Svd { rank: 16 });
    let white = error("white", CompressChoice::WhitenedSvd { rank: 16 });
    assert!(white < plain, "{white} {plain}");
    let paper = CompressChoice::LowRankSparse {
        rank: 16,
        rows: 0.1,
        score: MAGNITUDE,
        structure: Structure::Rows,
    };
    let paper = error("paper", paper);
    let ours = error(
        "ours",
        CompressChoice::Complement { rank: 16, rows: 0.1, structure: Structure::Rows },
    );
    assert!(ours < paper, "{ours} {paper}");
}

#[test]
fn along_the_text_compression_follows_recovery() {
    let dir = tempfile::tempdir().unwrap();
    let window = |w: u32| (0..64).map(|i| (i * i * 17 + i * 5 + w * 131) % 2048).collect();
    let text = || Calibration::from(Tokens::Windows((0..12).map(window).collect()));
    let error = |name: &str, compress| {
        let fast = Recipe::preset("fast", Keep::Experts(4)).unwrap();
        let recipe = Recipe { compress, ..fast.export(ExportChoice::Native) };
        let target = dir.path().join(name);
        let report = merge_then_compress(fixture("mixtral-8e"), text(), &target, &recipe);
        let report = report.unwrap();
        assert_eq!(report.compression.is_some(), compress.is_some());
        assert!(Checkpoint::open(&target).is_ok());
        error_of(&report)
    };
    let (none, low, most) = (error("none", None), error("low", svd(8)), error("most", svd(128)));
    assert!(low > none + 0.1, "{low} {none}");
    assert!((most / none - 1.0).abs() < 0.01, "{most} {none}");
}

#[test]
fn the_same_bytes_at_one_and_two_threads() {
    let dir = tempfile::tempdir().unwrap();
    let complement = CompressChoice::Complement { rank: 12, rows: 0.1, structure: Structure::Rows };
    let recipe = recipe(Some(complement), Keep::Experts(4), ExportChoice::Native);
    let of = |threads: usize| {
        let target = dir.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&recipe, &target)).unwrap();
        contents(&target)
    };
    assert!(of(1) == of(2));
}

#[test]
fn bad_budgets_are_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    // The header is whole, the weights are NaN: whoever reads them says so.
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for (name, mut bytes) in contents(&fixture("mixtral-8e")) {
        if name == "model.safetensors" {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + header..].fill(0xff);
        }
        fs::write(source.join(name), bytes).unwrap();
    }
    let lrs = |rank, rows| {
        Some(CompressChoice::LowRankSparse {
            rank,
            rows,
            score: MAGNITUDE,
            structure: Structure::Rows,
        })
    };
    for (compress, names) in [
        (svd(0), "rank of a compression: expected 1 or more"),
        (svd(129), "layers.0: rank: expected at most 128"),
        (lrs(0, 0.1), "rank of a compression"),
        (lrs(8, 0.0), "share of kept rows"),
        (lrs(8, 1.5), "share of kept rows"),
        (lrs(8, -0.5), "share of kept rows"),
        (lrs(8, f64::NAN), "share of kept rows"),
        (
            Some(CompressChoice::Sparse {
                rows: 2.0,
                score: MAGNITUDE,
                structure: Structure::Rows,
            }),
            "share of kept rows",
        ),
    ] {
        let recipe = recipe(compress, Keep::Experts(4), ExportChoice::Native);
        let stats = fixture("mixtral-8e.stats.safetensors");
        let error = merge_then_compress(&source, stats, &target, &recipe).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
        assert!(error.to_string().contains(names), "{error}");
    }
    // Whitening needs samples, which this file does not have.
    let bare = RoutingStats {
        logit_gram: Some(Array2::eye(8)),
        ..RoutingStats::from_counts(vec![1; 8], 4)
    };
    let layers = (0..4).map(|l| (LayerId::causal(l), bare.clone())).collect();
    let stats = dir.path().join("bare.safetensors");
    write_stats(&stats, &layers, &BTreeMap::new()).unwrap();
    let with = |choice| {
        let recipe = recipe(Some(choice), Keep::Experts(4), ExportChoice::Native);
        merge_then_compress(fixture("mixtral-8e"), &stats, &target, &recipe)
    };
    let error = with(CompressChoice::WhitenedSvd { rank: 8 }).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
    assert!(!target.exists());
    // Without them, the complement goes by magnitude. No stage sees a layer whole, and yet the
    // group-by-group path, which cannot compress, is not taken.
    let report =
        with(CompressChoice::Complement { rank: 8, rows: 0.1, structure: Structure::Rows })
            .unwrap();
    assert!(report.compression.is_some() && report.layers[0].output_error.is_none());
}

#[test]
fn recipes_name_it() {
    let text = "preset = 'm-smoe'\nexport = 'stock'\nkeep = { experts = 4 }\n";
    let with = |line: &str| Recipe::from_toml(&format!("{text}{line}"));
    let found = with("compress = { method = 'complement', rank = 8 }").unwrap();
    assert_eq!(
        found.compress,
        Some(CompressChoice::Complement { rank: 8, rows: 0.1, structure: Structure::Rows })
    );
    let paper = with("compress = { method = 'low-rank-sparse' }").unwrap();
    let preset = Recipe::preset("mc-smoe", Keep::Experts(4)).unwrap();
    assert_eq!(paper.compress, preset.compress);
    assert_eq!(Recipe::from_toml(&paper.to_toml().unwrap()).unwrap(), paper);
    for bad in ["method = 'svd', rows = 0.1", "rank = 3", "method = 'svdd'"] {
        let error = with(&format!("compress = {{ {bad} }}")).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Recipe { .. }), "{error}");
    }
}
