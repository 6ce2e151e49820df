//! A model of ten thousand tensors in a thousand shards, in time and with few open files.

#![allow(clippy::print_stderr)] // What a step took is told with a failure.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use mcsmoe::calibrate::write_stats;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::{LayerId, RoutingStats};
use mcsmoe::pipeline::{
    ExportChoice, Keep, Output, PlanOptions, Recipe, merge_then_compress, plan, verify,
};
use ndarray::Array2;

use crate::support::child_of;

const LAYERS: usize = 26;
const EXPERTS: usize = 128;
const SHARDS: usize = 1000;
const D: usize = 4;
const F: usize = 3;

/// Name and shape of every tensor: Qwen3-MoE with tiny matrices.
fn tensors() -> Vec<(String, [usize; 2])> {
    let mut all = vec![("model.embed_tokens.weight".to_owned(), [7, D])];
    for layer in 0..LAYERS {
        let block = format!("model.layers.{layer}");
        all.push((format!("{block}.mlp.gate.weight"), [EXPERTS, D]));
        all.push((format!("{block}.self_attn.o_proj.weight"), [D, D]));
        for expert in 0..EXPERTS {
            let shapes = [("gate_proj", [F, D]), ("up_proj", [F, D]), ("down_proj", [D, F])];
            all.extend(shapes.map(|(projection, shape)| {
                (format!("{block}.mlp.experts.{expert}.{projection}.weight"), shape)
            }));
        }
    }
    all
}

/// Writes model and statistics.
fn write(dir: &Path) {
    fs::create_dir(dir.join("source")).unwrap();
    let config = serde_json::json!({
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
        "num_experts_per_tok": 8, "norm_topk_prob": true, "hidden_size": D,
    });
    fs::write(dir.join("source/config.json"), config.to_string()).unwrap();
    let (all, mut random, mut map) = (tensors(), 1u32, serde_json::Map::new());
    assert!(all.len() >= 10_000, "{}", all.len());
    let per_shard = all.len().div_ceil(SHARDS);
    // The last shards share what rounding leaves.
    let cut = |i: usize| (i * per_shard).min(all.len() - (SHARDS - i).min(all.len()));
    for shard in 0..SHARDS {
        let file = format!("model-{:05}-of-{SHARDS:05}.safetensors", shard + 1);
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, shape) in &all[cut(shard)..cut(shard + 1)] {
            let from = data.len();
            for _ in 0..shape[0] * shape[1] {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let value = (random >> 8) as f32 / (1 << 23) as f32 - 1.0;
                data.extend(value.to_le_bytes());
            }
            let offsets = [from, data.len()];
            let tensor =
                serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets });
            header.insert(name.clone(), tensor);
            map.insert(name.clone(), file.clone().into());
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(data);
        fs::write(dir.join("source").join(file), bytes).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("source/model.safetensors.index.json"), index.to_string()).unwrap();
    let stats = |layer: usize| {
        let counts = (0..EXPERTS).map(|e| (e * 37 + layer * 11) as u64 % 101).collect();
        let gram = Array2::from_shape_fn((EXPERTS, EXPERTS), |(i, j)| {
            if i == j { 2.0 } else { 1.0 / (1 + i.abs_diff(j)) as f64 }
        });
        RoutingStats { logit_gram: Some(gram), ..RoutingStats::from_counts(counts, 1000) }
    };
    let layers: BTreeMap<LayerId, RoutingStats> =
        (0..LAYERS).map(|layer| (LayerId::causal(layer), stats(layer))).collect();
    write_stats(dir.join("stats.safetensors"), &layers, &BTreeMap::new()).unwrap();
}

/// Opens, lists, plans, merges into `shard_bytes` a file, and verifies; tells the seconds of each.
fn work(dir: &Path, shard_bytes: u64) {
    let mut last = Instant::now();
    let mut told = |what: &str| {
        eprintln!("{what}: {:.2} s", last.elapsed().as_secs_f64());
        last = Instant::now();
    };
    let source = Checkpoint::open(dir.join("source")).unwrap();
    told("open");
    assert_eq!(source.tensors().map(|(name, ..)| name.len()).filter(|n| *n > 0).count(), 10_037);
    assert_eq!(source.layers().len(), LAYERS);
    told("list");
    let recipe = Recipe::preset("m-smoe", Keep::Experts(64)).unwrap();
    let mut recipe = recipe.export(ExportChoice::Stock);
    recipe.shard_bytes = shard_bytes;
    let output = Output { shard_bytes, ..Output::new(recipe.export) };
    let planned = plan(&source, &recipe, &output, &PlanOptions::default()).unwrap();
    told("plan");
    let target = dir.join("target");
    let from = dir.join("source");
    merge_then_compress(&from, dir.join("stats.safetensors"), &target, &recipe).unwrap();
    told("run");
    let found = verify(&target, Some(&from)).unwrap();
    // Its config tells nothing of attention: only the forward pass may fail.
    for check in found.checks.iter().filter(|check| check.name.as_str() != "forward") {
        assert!(check.findings.is_empty(), "{check:?}");
    }
    told("verify");
    let shards = fs::read_dir(&target)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "safetensors"));
    assert_eq!(shards.count(), planned.shards);
    assert!(planned.shards > 500, "{}", planned.shards);
}

/// The child; `MCSMOE_LARGE_CHILD=FOLDER`.
#[test]
#[ignore = "run by the other test"]
fn child() {
    let Ok(dir) = std::env::var("MCSMOE_LARGE_CHILD") else { return };
    work(Path::new(&dir), 500);
}

#[test]
fn a_thousand_shards_need_neither_much_time_nor_many_open_files() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let program = std::env::current_exe().unwrap();
    // An eighth of what the source alone would need if every shard were held open.
    let mut command = match cfg!(unix) {
        true => Command::new("sh"),
        false => Command::new(&program),
    };
    if cfg!(unix) {
        command.args(["-c", r#"ulimit -n 128; exec "$@""#, "sh"]).arg(program);
    }
    command.args(["--exact", &child_of(module_path!())]);
    command.args(["--ignored", "--nocapture", "--test-threads", "1"]);
    let start = Instant::now();
    let status = command.env("MCSMOE_LARGE_CHILD", dir.path()).status().unwrap();
    assert!(status.success(), "with 128 open files");
    // A twentieth of it on an idle machine of two cores; what is quadratic takes longer.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}
