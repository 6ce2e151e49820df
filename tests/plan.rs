//! Plans of large models from their headers alone, which sparse files hold.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use mcsmoe::ErrorKind;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{
    Answer, CompressChoice, ExportChoice, Keep, Output, PlanOptions, Recipe, RoutingGroupPolicy,
    RunPlan, merge_then_compress, plan,
};
use serde_json::{Value, json};

/// A checkpoint whose files have headers and no data.
struct Sparse {
    dir: tempfile::TempDir,
    tensors: Vec<Tensor>,
}

/// Name, data type, shape.
type Tensor = (String, &'static str, Vec<usize>);

impl Sparse {
    /// In a folder that goes away, or, to look at, in the one that `MCSMOE_KEEP` names.
    fn new(config: &Value) -> Self {
        let dir = match std::env::var_os("MCSMOE_KEEP") {
            None => tempfile::tempdir().unwrap(),
            Some(folder) => {
                let prefix = format!("{}-", config["model_type"].as_str().unwrap());
                let mut builder = tempfile::Builder::new();
                builder.disable_cleanup(true).prefix(&prefix).tempdir_in(folder).unwrap()
            }
        };
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Self { dir, tensors: Vec::new() }
    }

    fn add(&mut self, name: &str, shape: &[usize]) {
        self.tensors.push((format!("{name}.weight"), "BF16", shape.to_vec()));
    }

    /// With a scale for every block of 128 × 128.
    fn add_fp8(&mut self, name: &str, shape: &[usize]) {
        self.tensors.push((format!("{name}.weight"), "F8_E4M3", shape.to_vec()));
        let scales = shape.iter().map(|n| n.div_ceil(128)).collect();
        self.tensors.push((format!("{name}.weight_scale_inv"), "F32", scales));
    }

    /// Writes files of about 5 GB each, which take no room on the disk.
    fn finish(self) -> tempfile::TempDir {
        let mut map = serde_json::Map::new();
        for (n, shard) in self.shards().into_iter().enumerate() {
            let name = format!("model-{n:05}.safetensors");
            let (mut header, mut end) = (serde_json::Map::new(), 0u64);
            for (tensor, dtype, shape) in shard {
                let start = end;
                end += size(dtype, shape);
                let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
                header.insert(tensor.clone(), entry);
                map.insert(tensor.clone(), json!(name));
            }
            let text = Value::Object(header).to_string();
            let mut file = File::create(self.dir.path().join(&name)).unwrap();
            file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file.set_len(8 + text.len() as u64 + end).unwrap();
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        let path = self.dir.path().join("model.safetensors.index.json");
        fs::write(path, index.to_string()).unwrap();
        self.dir
    }

    fn shards(&self) -> Vec<Vec<&Tensor>> {
        let (mut shards, mut filled) = (vec![Vec::new()], 0);
        for tensor in &self.tensors {
            filled += size(tensor.1, &tensor.2);
            if filled > 5_000_000_000 {
                shards.push(Vec::new());
                filled = 0;
            }
            shards.last_mut().unwrap().push(tensor);
        }
        shards
    }
}

fn size(dtype: &str, shape: &[usize]) -> u64 {
    let width = match dtype {
        "F8_E4M3" => 1,
        "BF16" => 2,
        _ => 4,
    };
    width * shape.iter().map(|&n| n as u64).product::<u64>()
}

fn attention(model: &mut Sparse, at: &str, d: usize, heads: usize, kv: usize, width: usize) {
    for (name, rows) in [("q_proj", heads * width), ("k_proj", kv * width), ("v_proj", kv * width)]
    {
        model.add(&format!("{at}.self_attn.{name}"), &[rows, d]);
    }
    model.add(&format!("{at}.self_attn.o_proj"), &[d, heads * width]);
    model.add(&format!("{at}.input_layernorm"), &[d]);
    model.add(&format!("{at}.post_attention_layernorm"), &[d]);
}

fn ends(model: &mut Sparse, vocab: usize, d: usize) {
    model.add("model.embed_tokens", &[vocab, d]);
    model.add("model.norm", &[d]);
    model.add("lm_head", &[vocab, d]);
}

fn mixtral_8x7b() -> tempfile::TempDir {
    let (d, f, layers) = (4096, 14336, 32);
    let mut model = Sparse::new(&json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "tie_word_embeddings": false, "max_position_embeddings": 32768,
    }));
    ends(&mut model, 32000, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        attention(&mut model, &at, d, 32, 8, 128);
        model.add(&format!("{at}.block_sparse_moe.gate"), &[8, d]);
        for e in 0..8 {
            let at = format!("{at}.block_sparse_moe.experts.{e}");
            model.add(&format!("{at}.w1"), &[f, d]);
            model.add(&format!("{at}.w2"), &[d, f]);
            model.add(&format!("{at}.w3"), &[f, d]);
        }
    }
    model.finish()
}

fn qwen3_235b_a22b() -> tempfile::TempDir {
    let (d, f, layers) = (4096, 1536, 94);
    let mut model = Sparse::new(&json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "hidden_size": d, "intermediate_size": 12288, "moe_intermediate_size": f,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "tie_word_embeddings": false,
        "max_position_embeddings": 40960,
    }));
    ends(&mut model, 151_936, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        attention(&mut model, &at, d, 64, 4, 128);
        model.add(&format!("{at}.self_attn.q_norm"), &[128]);
        model.add(&format!("{at}.self_attn.k_norm"), &[128]);
        model.add(&format!("{at}.mlp.gate"), &[128, d]);
        gated(&mut model, &at, 128, f, d, false);
    }
    model.finish()
}

fn gated(model: &mut Sparse, at: &str, experts: usize, f: usize, d: usize, fp8: bool) {
    for e in 0..experts {
        for (name, shape) in [("gate_proj", [f, d]), ("up_proj", [f, d]), ("down_proj", [d, f])] {
            let name = format!("{at}.mlp.experts.{e}.{name}");
            if fp8 { model.add_fp8(&name, &shape) } else { model.add(&name, &shape) }
        }
    }
}

/// FP8 in blocks, three dense layers, a layer of multi-token prediction.
fn deepseek_v3() -> tempfile::TempDir {
    let (d, f, layers) = (7168, 2048, 61);
    let mut model = Sparse::new(&json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_act": "silu", "hidden_size": d, "intermediate_size": 18432,
        "moe_intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
        "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "max_position_embeddings": 163840, "tie_word_embeddings": false,
        "quantization_config": { "quant_method": "fp8", "fmt": "e4m3",
                                 "weight_block_size": [128, 128] },
    }));
    ends(&mut model, 129_280, d);
    for l in 0..=layers {
        let at = format!("model.layers.{l}");
        for (name, shape) in [
            ("q_a_proj", [1536, d]),
            ("q_b_proj", [128 * 192, 1536]),
            ("kv_a_proj_with_mqa", [576, d]),
            ("kv_b_proj", [128 * 256, 512]),
            ("o_proj", [d, 128 * 128]),
        ] {
            model.add_fp8(&format!("{at}.self_attn.{name}"), &shape);
        }
        if l < 3 {
            model.add_fp8(&format!("{at}.mlp.gate_proj"), &[18432, d]);
            model.add_fp8(&format!("{at}.mlp.up_proj"), &[18432, d]);
            model.add_fp8(&format!("{at}.mlp.down_proj"), &[d, 18432]);
            continue;
        }
        model.add(&format!("{at}.mlp.gate"), &[256, d]);
        let bias = format!("{at}.mlp.gate.e_score_correction_bias");
        model.tensors.push((bias, "F32", vec![256]));
        gated(&mut model, &at, 256, f, d, true);
        model.add_fp8(&format!("{at}.mlp.shared_experts.gate_proj"), &[f, d]);
        model.add_fp8(&format!("{at}.mlp.shared_experts.up_proj"), &[f, d]);
        model.add_fp8(&format!("{at}.mlp.shared_experts.down_proj"), &[d, f]);
        if l == layers {
            model.add(&format!("{at}.eh_proj"), &[d, 2 * d]);
        }
    }
    model.finish()
}

fn of(model: &Path, recipe: &Recipe) -> mcsmoe::Result<RunPlan> {
    let source = Checkpoint::open(model)?;
    let options = PlanOptions { threads: 16, ..PlanOptions::default() };
    plan(&source, recipe, &Output::new(recipe.export), &options)
}

fn stock(preset: &str, keep: Keep) -> Recipe {
    Recipe::preset(preset, keep).unwrap().export(ExportChoice::Stock)
}

fn answers(plan: &RunPlan) -> Vec<Answer> {
    assert_eq!(plan.runtimes.iter().map(|r| &*r.runtime).collect::<Vec<_>>(), RUNTIMES);
    plan.runtimes.iter().map(|r| r.answer).collect()
}

const RUNTIMES: [&str; 3] = ["transformers", "vllm", "llama.cpp"];

#[test]
fn mixtral_8x7b_is_planned_from_headers() {
    let model = mixtral_8x7b();
    let found = of(model.path(), &stock("fast", Keep::Experts(4))).unwrap();
    // 46.70 B as published; an expert has 3 · 4096 · 14336 parameters.
    assert_eq!(found.parameters.before, 46_702_792_704);
    let gone = 32 * 4 * (3 * 4096 * 14336 + 4096);
    assert_eq!(found.parameters.after, 46_702_792_704 - gone);
    assert_eq!(found.tensor_bytes.after, 2 * found.parameters.after);
    assert_eq!(found.expert_bytes.before, 2 * 32 * 8 * 3 * 4096 * 14336);
    assert_eq!((found.experts.before, found.experts.after), (256, 128));
    assert_eq!(found.shards, 10);
    // A layer in f32 is 5.6 GB, with its pages 8.5 GB; nothing near the model's 93 GB.
    assert!((8_400_000_000..20_000_000_000).contains(&found.memory.peak), "{:?}", found.memory);
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    let vllm = found.runtimes[1].notes.join("\n");
    assert!(vllm.contains("even over 1, 2, 4 ranks"), "{vllm}");
    let time = found.time.unwrap();
    assert!(time.total > 0.0 && time.calibrate > 0.0 && time.rates.flops > 1e8, "{time:?}");

    let error = of(model.path(), &stock("fast", Keep::Experts(1))).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Budget { .. }), "{error}");
    assert!(error.to_string().contains("the router chooses 2"), "{error}");

    // A global budget: layers of unequal numbers, which no stock class reads.
    let native = Recipe::preset("mc-smoe", Keep::Total(128)).unwrap();
    let found = of(model.path(), &native).unwrap();
    let refused = [Answer::Accepts, Answer::Refuses, Answer::Refuses];
    assert!(found.spread && answers(&found) == refused);
    assert!(found.runtimes[0].notes.join("\n").contains("trust_remote_code=True"));
    assert!(found.runtimes[1].reasons.join("\n").contains("one number for all"));
    assert!(found.tensor_bytes.saved() > 0.8, "{:?}", found.tensor_bytes);
}

#[test]
fn qwen3_235b_is_planned_from_headers() {
    let model = qwen3_235b_a22b();
    let found = of(model.path(), &stock("m-smoe", Keep::Fraction(0.75))).unwrap();
    assert!((235_000_000_000..235_200_000_000).contains(&found.parameters.before));
    assert_eq!(found.experts_per_layer, vec![96; 94]);
    assert!(found.memory.peak < 32_000_000_000, "{:?}", found.memory);
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    let vllm = found.runtimes[1].notes.join("\n");
    assert!(vllm.contains("1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48 ranks"), "{vllm}");
    // Rank 32 and a tenth of the rows, from the paper.
    let recipe = Recipe {
        compress: Some(CompressChoice::Svd { rank: 64 }),
        ..stock("m-smoe", Keep::Experts(64))
    };
    let native = recipe.clone().export(ExportChoice::Native);
    let (stock, native) = (of(model.path(), &recipe).unwrap(), of(model.path(), &native).unwrap());
    assert!(native.tensor_bytes.after < stock.tensor_bytes.after / 2, "factors are smaller");
}

#[test]
fn deepseek_v3_is_planned_from_headers() {
    let model = deepseek_v3();
    let found = of(model.path(), &stock("fast", Keep::Experts(128))).unwrap();
    // 671 B as published and the layer of prediction; as bf16 half of the experts are as large.
    assert!((682_000_000_000..685_000_000_000).contains(&found.parameters.before), "{found:?}");
    assert!(
        (0.9..1.1).contains(&(found.expert_bytes.after as f64 / found.expert_bytes.before as f64))
    );
    let (why, n) = found.dropped.iter().find(|(why, _)| why.contains("multi-token")).unwrap();
    assert!(*n > 1500, "{why}: {n}");
    assert!(found.dropped.keys().any(|why| why.contains("dequantised")));
    assert_eq!(answers(&found), [Answer::Accepts; 3]);
    for runtime in &found.runtimes {
        assert!(runtime.notes.join("\n").contains("multi-token-prediction"), "{runtime:?}");
    }
    // Eight routing groups divide 128 experts, not 100; flattened, any number will do.
    let odd = stock("fast", Keep::Experts(100));
    let error = of(model.path(), &odd).unwrap_err();
    assert!(error.to_string().contains("do not divide into 8 routing groups"), "{error}");
    let flat = Recipe { routing_groups: RoutingGroupPolicy::Flatten, ..odd };
    assert_eq!(of(model.path(), &flat).unwrap().experts_per_layer, vec![100; 58]);
}

#[test]
fn what_is_planned_is_what_is_written() {
    let fixture = |name: &str| -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    };
    let (model, stats) = (fixture("mixtral-8e"), fixture("mixtral-8e.stats.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&model).unwrap();
    let kinds = [
        ("fast", Keep::Experts(4), ExportChoice::Stock),
        ("m-smoe", Keep::Total(18), ExportChoice::Native),
        ("mc-smoe", Keep::Experts(5), ExportChoice::Native),
        ("hc-smoe", Keep::Experts(3), ExportChoice::Expanded),
    ];
    for (preset, keep, export) in kinds {
        let mut recipe = Recipe::preset(preset, keep).unwrap().export(export);
        recipe.shard_bytes = 900_000;
        let output = Output { shard_bytes: 900_000, ..Output::new(export) };
        let options = PlanOptions { text: false, measure: false, ..PlanOptions::default() };
        let planned = plan(&source, &recipe, &output, &options).unwrap();
        assert!(planned.time.is_none());
        let target = dir.path().join(preset);
        let report = merge_then_compress(&model, &stats, &recipe, &target).unwrap();
        let written = report.written.unwrap();
        assert_eq!(planned.parameters, written.parameters, "{preset}");
        assert_eq!(planned.tensor_bytes, written.tensor_bytes, "{preset}");
        assert_eq!(planned.expert_bytes, written.expert_bytes, "{preset}");
        assert_eq!(planned.experts, report.experts, "{preset}");
        let shards = fs::read_dir(&target)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "safetensors"));
        // Where a global budget spreads experts, files are cut at other places.
        assert!(planned.spread || planned.shards == shards.count(), "{preset}");
    }
}
