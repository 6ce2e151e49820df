//! The native forward pass against logits of the reference implementation on tiny random
//! checkpoints, one per family and feature; see `tools/make_forward_fixtures.py`.

use std::path::{Path, PathBuf};

use crate::support::fixture;
use crate::support::weights;
use crate::support::weights::Folder;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::{Causal, Choice, Observation, route, routed_sum};
use mcsmoe::model::{Grouping, LayerId, MergedLayer, TensorSource};
use mcsmoe::stage::Context;
use mcsmoe::{Error, ErrorKind};
use ndarray::{Array2, ArrayView2, Axis, Ix3};

/// Both sides compute in f32 and differ in the order of additions. A fixture's logit is reached
/// through some 6 sums of at most 40 terms of size 5: √6 · √40 · ε · 5 ≈ 1e-5, measured 7e-6. A
/// norm's ε that is wrong by a factor of 10 would show as 1e-4.
const TOLERANCE: f32 = 2e-5;

/// The same for checkpoints of usual width, where sums are longer.
const FULL_TOLERANCE: f32 = 2e-4;

const CAUSAL: [&str; 13] = [
    "mixtral",
    "mixtral-sliding",
    "qwen2-moe",
    "qwen2-moe-sliding",
    "qwen3-moe-bias-linear",
    "qwen3-moe-dynamic",
    "qwen3-moe-llama3",
    "olmoe",
    "olmoe-bias",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "deepseek-v3-halves",
];

/// Families that differ from those by a few keys, read as a user reads them.
const RELATIVES: [&str; 9] = [
    "glm4-moe",
    "glm4-moe-lite",
    "dots1",
    "ernie-4.5-moe",
    "minimax-m2",
    "gpt-oss",
    "deepseek-v3.2",
    "glm-5",
    "exaone-moe",
];

/// Families with a recurrence along the window, over more tokens than one of its chunks has.
const RECURRENT: [&str; 2] = ["qwen3-next", "qwen3.5-moe"];

fn folder_of(name: &str) -> PathBuf {
    fixture(&format!("forward/{name}"))
}

fn causal(name: &str) -> Causal<Folder> {
    Causal::open(Folder::open(&folder_of(name)), Context::cpu(0)).unwrap()
}

fn ids(values: &[f32]) -> Vec<u32> {
    values.iter().map(|&x| x as u32).collect()
}

fn rows(tensor: &ndarray::ArrayD<f32>) -> Vec<Vec<u32>> {
    tensor.axis_iter(Axis(0)).map(|row| ids(row.as_slice().unwrap())).collect()
}

fn difference(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    // NaN must not disappear in `max`.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

/// The largest difference to the golden logits, and the largest golden logit.
fn against_golden<S: TensorSource>(model: &Causal<S>, golden: &Path) -> (f32, f32) {
    let golden = weights::tensors(golden);
    let logits = golden["logits"].view().into_dimensionality::<Ix3>().unwrap();
    let each = rows(&golden["tokens"]).into_iter().zip(logits.axis_iter(Axis(0)));
    let largest = logits.iter().fold(0.0f32, |m, z| m.max(z.abs()));
    let differences = each.map(|(tokens, z)| difference(model.logits(&tokens).unwrap().view(), z));
    (differences.fold(0.0, f32::max), largest)
}

#[test]
fn logits_equal_the_references() {
    for name in CAUSAL {
        let (d, of) = against_golden(&causal(name), &folder_of(name).join("golden.safetensors"));
        println!("{name}: {d:e} of {of}");
        assert!(d <= TOLERANCE, "{name}: {d}");
    }
}

fn logits_and_continuation_equal(name: &str, tolerance: f32) {
    let source = Checkpoint::open(folder_of(name)).unwrap();
    let model = Causal::open(source, Context::cpu(0)).unwrap();
    let path = folder_of(name).join("golden.safetensors");
    let (d, of) = against_golden(&model, &path);
    assert!(d <= tolerance, "{name}: {d:e} of {of}");
    let golden = weights::tensors(&path);
    let prompt = ids(golden["prompt"].as_slice().unwrap());
    let expected = ids(golden["continuation"].as_slice().unwrap());
    assert_eq!(model.generate(&prompt, 12).unwrap(), expected, "{name}");
}

#[test]
fn logits_and_continuations_of_relatives_equal_the_references() {
    RELATIVES.iter().for_each(|name| logits_and_continuation_equal(name, TOLERANCE));
}

#[test]
fn logits_and_continuations_of_recurrent_families_equal_the_references() {
    RECURRENT.iter().for_each(|name| logits_and_continuation_equal(name, FULL_TOLERANCE));
}

#[test]
fn windows_beyond_the_keys_that_an_indexer_chooses_are_refused() {
    for name in ["deepseek-v3.2", "glm-5"] {
        let source = Checkpoint::open(folder_of(name)).unwrap();
        let model = Causal::open(source, Context::cpu(0)).unwrap();
        assert!(model.logits(&[1; 32]).is_ok(), "{name}");
        let error = model.logits(&[1; 33]).unwrap_err().to_string();
        assert!(error.contains("1 to 32 tokens (index_topk: "), "{error}");
    }
}

/// `MCSMOE_FORWARD=MODEL_DIR:GOLDEN_DIR[,…]`: any checkpoint on this machine.
#[test]
#[ignore = "needs a checkpoint and its golden logits"]
fn logits_equal_the_references_on_given_checkpoints() {
    for pair in std::env::var("MCSMOE_FORWARD").unwrap().split(',') {
        let (dir, golden) = pair.split_once(':').unwrap();
        let model = Causal::open(Folder::open(Path::new(dir)), Context::cpu(0)).unwrap();
        let (d, of) = against_golden(&model, &Path::new(golden).join("golden.safetensors"));
        println!("{dir}: {d:e} of {of}");
        assert!(d <= FULL_TOLERANCE, "{dir}: {d}");
    }
}

#[test]
fn greedy_continuations_equal_the_references() {
    for name in CAUSAL {
        let golden = weights::tensors(&folder_of(name).join("golden.safetensors"));
        let prompt = ids(golden["prompt"].as_slice().unwrap());
        let expected = ids(golden["continuation"].as_slice().unwrap());
        assert_eq!(causal(name).generate(&prompt, 12).unwrap(), expected, "{name}");
    }
}

#[test]
fn generation_ends_with_the_end_token() {
    let mut folder = Folder::open(&folder_of("olmoe"));
    let free = Causal::open(&folder, Context::cpu(0)).unwrap().generate(&[1, 2], 6).unwrap();
    folder.config["eos_token_id"] = serde_json::json!([free[2]]);
    let ended = Causal::open(&folder, Context::cpu(0)).unwrap().generate(&[1, 2], 6).unwrap();
    let first = free.iter().position(|t| *t == free[2]).unwrap();
    assert_eq!(ended, free[..=first]);
}

#[test]
fn a_cache_gives_the_same_tokens_as_full_passes() {
    for name in ["mixtral-sliding", "deepseek-v2", "qwen2-moe", "olmoe"] {
        let model = causal(name);
        let mut tokens = vec![5, 9, 33];
        let generated = model.generate(&tokens, 8).unwrap();
        for token in generated {
            let logits = model.logits(&tokens).unwrap();
            let last = logits.row(tokens.len() - 1);
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(best as u32, token, "{name}");
            tokens.push(token);
        }
    }
}

fn nll_of_logits(logits: &Array2<f32>, tokens: &[u32]) -> f64 {
    let term = |t: usize| {
        let row = logits.row(t).mapv(f64::from);
        row.mapv(f64::exp).sum().ln() - row[tokens[t + 1] as usize]
    };
    (0..tokens.len() - 1).map(term).sum()
}

#[test]
fn streamed_cross_entropy_equals_that_of_the_logits() {
    for name in CAUSAL {
        let model = causal(name);
        let window = |n: u32, seed: u32| (0..n).map(|i| (i * i + seed * 7) % 64).collect();
        let windows: Vec<Vec<u32>> = vec![window(31, 1), window(1, 2), window(40, 3)];
        let streamed = model.nll(&windows).unwrap();
        assert_eq!(streamed.iter().map(|(_, n)| *n).collect::<Vec<_>>(), [30, 0, 39]);
        for (window, (nll, _)) in windows.iter().zip(streamed) {
            let expected = nll_of_logits(&model.logits(window).unwrap(), window);
            assert!((nll - expected).abs() < 1e-4 * (1.0 + expected), "{name}: {nll} {expected}");
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    for name in ["qwen2-moe", "deepseek-v3"] {
        let model = causal(name);
        let windows: Vec<Vec<u32>> =
            (0..150).map(|w| (0..40).map(|i| (i * w + w) % 64).collect()).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let hidden = model.run(&windows, None).unwrap();
                (hidden.states.mapv(f32::to_bits), model.nll(&windows).unwrap())
            })
        };
        let one = run(1);
        assert!([2, 3].into_iter().all(|threads| run(threads) == one), "{name}");
    }
}

#[test]
fn observers_see_every_sparse_layer_once() {
    let model = causal("deepseek-v3");
    let mut seen = Vec::new();
    let windows = [vec![1, 2, 3], vec![4, 5]];
    let mut observe = |o: &Observation<'_>| {
        assert_eq!((o.inputs.nrows(), o.windows), (5, &[0..3, 3..5][..]));
        let own = o.layer.mapped_output(o.inputs, &mcsmoe::linalg::Cpu::new())?;
        assert!(difference(own.view(), o.output) < 1e-5);
        assert_eq!(o.routed.visits.iter().map(Vec::len).sum::<usize>(), 5 * 3);
        seen.push(o.id);
        Ok(())
    };
    model.run(&windows, Some(&mut observe)).unwrap();
    assert_eq!(seen, [LayerId::causal(1)]);
}

#[test]
fn an_identical_substitute_changes_nothing() {
    let model = causal("qwen2-moe-sliding");
    let hidden = model.embed(&[vec![3, 1, 4, 1, 5]]).unwrap();
    let layer = model.layer(0).unwrap();
    let cx = Context::cpu(0);
    let mut own = hidden.states.clone();
    layer.forward(&mut own, &hidden.windows, None, &cx).unwrap();
    let mut other = hidden.states;
    layer.attention_half(&mut other, &hidden.windows, &cx).unwrap();
    let feed = layer.feed();
    let x = feed.input(other.view()).unwrap();
    let copy = feed.moe().unwrap().clone();
    let substitute = Some((&copy, Choice::Narrowed));
    feed.add_to(&mut other, x.view(), &hidden.windows, substitute, None, &cx).unwrap();
    assert_eq!(own, other);
}

fn with(name: &str, change: impl FnOnce(&mut Folder)) -> mcsmoe::Result<Array2<f32>> {
    let mut folder = Folder::open(&folder_of(name));
    change(&mut folder);
    Causal::open(folder, Context::cpu(0))?.logits(&[1, 2, 3])
}

fn failure(name: &str, change: impl FnOnce(&mut Folder)) -> Error {
    with(name, change).unwrap_err()
}

#[test]
fn windows_beyond_the_context_and_unknown_tokens_are_refused() {
    let model = causal("mixtral");
    let error = model.logits(&[1; 65]).unwrap_err().to_string();
    assert!(error.contains("1 to 64 tokens (max_position_embeddings), found 65"), "{error}");
    assert!(model.logits(&[1; 64]).is_ok() && model.logits(&[]).is_err());
    let error = model.logits(&[63, 64]).unwrap_err().to_string();
    assert!(error.contains("below the vocabulary of 64, found 64"), "{error}");
    assert!(model.generate(&[1; 60], 5).is_err());
    assert!(causal("qwen3-moe-dynamic").logits(&[1; 49]).is_err());
}

#[test]
fn missing_misshapen_and_non_finite_weights_name_layer_and_tensor() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    let error = failure("mixtral", |f| drop(f.tensors.remove(name)));
    assert_eq!(error.place().tensor.as_deref(), Some(name));
    assert_eq!(error.place().layer.as_deref(), Some("layers.1"));

    let error = failure("mixtral", |f| f.config["num_key_value_heads"] = 4.into());
    assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{error}");
    assert!(error.place().tensor.is_some());

    let error = failure("olmoe", |f| f.tensors.get_mut(name).unwrap()[[1, 1]] = f32::NAN);
    assert!(error.to_string().contains("k_proj.weight`: weight holds NaN"), "{error}");
}

#[test]
fn hidden_states_that_overflow_are_an_error_of_their_layer() {
    let error = failure("mixtral", |f| {
        let up = f.tensors.get_mut("model.layers.0.block_sparse_moe.experts.0.w3.weight");
        up.unwrap().fill(3e38);
    });
    assert!(matches!(error.kind(), ErrorKind::NotFinite { .. }), "{error}");
    assert_eq!(error.place().layer.as_deref(), Some("layers.0"));
}

#[test]
fn other_families_are_unsupported() {
    let error = failure("mixtral", |f| f.config["model_type"] = "dbrx".into());
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }));
    assert!(error.to_string().contains("qwen3_moe"), "{error}");
}

#[test]
fn a_merged_layer_runs_by_its_map() {
    let folder = Folder::open(&folder_of("mixtral"));
    let mut copied = folder.moe(LayerId::causal(1)).unwrap();
    let labels = vec![Some(0), Some(1), Some(0), Some(1)];
    let grouping = Grouping::new(labels, vec![0, 1]).unwrap();
    let (experts, router) = (copied.experts[..2].to_vec(), copied.router.clone());
    let merged = MergedLayer::new(copied.id, experts, grouping, router, None).unwrap();
    copied.experts[2] = copied.experts[0].clone();
    copied.experts[3] = copied.experts[1].clone();

    let x = Array2::from_shape_fn((50, 32), |(i, j)| ((i * 7 + j * 3) as f32).sin());
    let cx = Context::cpu(0);
    let run = |layer: &MergedLayer| {
        let routed =
            route(layer, Choice::Mapped, x.view(), std::slice::from_ref(&(0..50)), None, &cx)
                .unwrap();
        routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap()
    };
    assert!(difference(run(&merged).view(), run(&copied).view()) < 1e-5);
}
