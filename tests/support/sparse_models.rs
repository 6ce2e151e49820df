//! Large models as sparse files: headers with every tensor's name, type and shape, and no data.

use std::fs::{self, File};
use std::io::Write;

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

    fn raw(&mut self, name: String, dtype: &'static str, shape: &[usize]) {
        self.tensors.push((name, dtype, shape.to_vec()));
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
        "F8_E4M3" | "U8" => 1,
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

pub(crate) fn mixtral_8x7b() -> tempfile::TempDir {
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

pub(crate) fn qwen3_235b_a22b() -> tempfile::TempDir {
    qwen3((4096, 1536, 94), 64)
}

pub(crate) fn qwen3_30b_a3b() -> tempfile::TempDir {
    qwen3((2048, 768, 48), 32)
}

fn qwen3((d, f, layers): (usize, usize, usize), heads: usize) -> tempfile::TempDir {
    let mut model = Sparse::new(&json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "hidden_size": d, "intermediate_size": 8 * f, "moe_intermediate_size": f,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "tie_word_embeddings": false,
        "max_position_embeddings": 40960,
    }));
    ends(&mut model, 151_936, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        attention(&mut model, &at, d, heads, 4, 128);
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
pub(crate) fn deepseek_v3() -> tempfile::TempDir {
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

/// A dense first layer, shared experts, multi-head latent attention without a low rank of queries.
pub(crate) fn deepseek_v2_lite() -> tempfile::TempDir {
    let (d, f, layers) = (2048, 1408, 27);
    let mut model = Sparse::new(&json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "hidden_act": "silu", "hidden_size": d, "intermediate_size": 10944,
        "moe_intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "norm_topk_prob": false, "routed_scaling_factor": 1.0, "q_lora_rank": null,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 102_400, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "max_position_embeddings": 163_840, "tie_word_embeddings": false,
    }));
    ends(&mut model, 102_400, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        for (name, shape) in [
            ("q_proj", [16 * 192, d]),
            ("kv_a_proj_with_mqa", [576, d]),
            ("kv_b_proj", [16 * 256, 512]),
            ("o_proj", [d, 16 * 128]),
        ] {
            model.add(&format!("{at}.self_attn.{name}"), &shape);
        }
        model.add(&format!("{at}.self_attn.kv_a_layernorm"), &[512]);
        model.add(&format!("{at}.input_layernorm"), &[d]);
        model.add(&format!("{at}.post_attention_layernorm"), &[d]);
        let (place, width) = if l == 0 { ("mlp", 10_944) } else { ("mlp.shared_experts", 2 * f) };
        for (name, shape) in
            [("gate_proj", [width, d]), ("up_proj", [width, d]), ("down_proj", [d, width])]
        {
            model.add(&format!("{at}.{place}.{name}"), &shape);
        }
        if l > 0 {
            model.add(&format!("{at}.mlp.gate"), &[64, d]);
            gated(&mut model, &at, 64, f, d, false);
        }
    }
    model.finish()
}

/// Experts fused, with biases, in MXFP4: 32 values in 16 bytes and a scale.
pub(crate) fn gpt_oss_20b() -> tempfile::TempDir {
    let (d, f, n, layers) = (2880, 2880, 32, 24);
    let mut model = Sparse::new(&json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": n,
        "num_experts_per_tok": 4, "experts_per_token": 4, "swiglu_limit": 7.0,
        "sliding_window": 128, "vocab_size": 201_088, "rms_norm_eps": 1e-5,
        "rope_theta": 150_000, "tie_word_embeddings": false, "max_position_embeddings": 131_072,
        "quantization_config": { "quant_method": "mxfp4" },
    }));
    ends(&mut model, 201_088, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        attention(&mut model, &at, d, 64, 8, 64);
        for (name, width) in [("q", 4096), ("k", 512), ("v", 512), ("o", d)] {
            model.raw(format!("{at}.self_attn.{name}_proj.bias"), "BF16", &[width]);
        }
        model.raw(format!("{at}.self_attn.sinks"), "BF16", &[64]);
        model.add(&format!("{at}.mlp.router"), &[n, d]);
        model.raw(format!("{at}.mlp.router.bias"), "BF16", &[n]);
        for (name, rows, cols) in [("gate_up_proj", 2 * f, d), ("down_proj", d, f)] {
            let name = format!("{at}.mlp.experts.{name}");
            model.raw(format!("{name}_blocks"), "U8", &[n, rows, cols / 32, 16]);
            model.raw(format!("{name}_scales"), "U8", &[n, rows, cols / 32]);
            model.raw(format!("{name}_bias"), "BF16", &[n, rows]);
        }
    }
    model.finish()
}

pub(crate) fn olmoe_1b_7b() -> tempfile::TempDir {
    let (d, f, layers) = (2048, 1024, 16);
    let mut model = Sparse::new(&json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
        "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": false, "vocab_size": 50304,
        "rms_norm_eps": 1e-5, "rope_theta": 10000, "tie_word_embeddings": false,
        "max_position_embeddings": 4096,
    }));
    ends(&mut model, 50304, d);
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        attention(&mut model, &at, d, 16, 16, 128);
        model.add(&format!("{at}.self_attn.q_norm"), &[d]);
        model.add(&format!("{at}.self_attn.k_norm"), &[d]);
        model.add(&format!("{at}.mlp.gate"), &[64, d]);
        gated(&mut model, &at, 64, f, d, false);
    }
    model.finish()
}

/// Every second block of encoder and decoder is sparse; experts of two matrices, top-1.
pub(crate) fn switch_base_8() -> tempfile::TempDir {
    let (d, f, layers) = (768, 3072, 12);
    let mut model = Sparse::new(&json!({
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers", "dense_act_fn": "relu", "d_model": d, "d_ff": f,
        "d_kv": 64, "num_heads": 12, "num_layers": layers, "num_decoder_layers": layers,
        "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "num_experts": 8, "expert_capacity": 64, "router_bias": false,
        "router_dtype": "float32", "is_encoder_decoder": true, "vocab_size": 32128,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6, "tie_word_embeddings": true,
    }));
    model.raw("shared.weight".into(), "F32", &[32128, d]);
    for (stack, last) in [("encoder", 1), ("decoder", 2)] {
        model.raw(format!("{stack}.final_layer_norm.weight"), "F32", &[d]);
        for l in 0..layers {
            let block = format!("{stack}.block.{l}");
            for layer in 0..last {
                let kind = if layer == 0 { "SelfAttention" } else { "EncDecAttention" };
                let at = format!("{block}.layer.{layer}");
                for name in ["q", "k", "v", "o"] {
                    model.raw(format!("{at}.{kind}.{name}.weight"), "F32", &[d, d]);
                }
                model.raw(format!("{at}.layer_norm.weight"), "F32", &[d]);
            }
            if l == 0 {
                let bias = "layer.0.SelfAttention.relative_attention_bias.weight";
                model.raw(format!("{block}.{bias}"), "F32", &[32, 12]);
            }
            let at = format!("{block}.layer.{last}");
            model.raw(format!("{at}.layer_norm.weight"), "F32", &[d]);
            let mut experts = vec!["mlp".to_owned()];
            if l % 2 == 1 {
                model.raw(format!("{at}.mlp.router.classifier.weight"), "F32", &[8, d]);
                experts = (0..8).map(|e| format!("mlp.experts.expert_{e}")).collect();
            }
            for expert in experts {
                model.raw(format!("{at}.{expert}.wi.weight"), "F32", &[f, d]);
                model.raw(format!("{at}.{expert}.wo.weight"), "F32", &[d, f]);
            }
        }
    }
    model.finish()
}
