//! Tiny checkpoints of every layout, written through the `safetensors` crate.
#![allow(dead_code, unreachable_pub)] // The two programs that include it use parts.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[path = "layouts.rs"]
pub mod layouts;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A tensor to write: type, shape, bytes.
#[derive(Clone, PartialEq, Debug)]
pub struct Raw(pub Dtype, pub Vec<usize>, pub Vec<u8>);

/// A checkpoint to write.
#[derive(Clone)]
pub struct Tiny {
    pub config: String,
    pub tensors: BTreeMap<String, Raw>,
    random: u32,
}

pub const D: usize = 6;
pub const F: usize = 5;
pub const N: usize = 4;

impl Tiny {
    fn new(config: String) -> Self {
        Self { config, tensors: BTreeMap::new(), random: 7 }
    }

    /// Adds a tensor of values in −1..1.
    pub fn add(&mut self, name: impl Into<String>, dtype: Dtype, shape: &[usize]) {
        let mut bytes = Vec::new();
        for _ in 0..shape.iter().product::<usize>() {
            self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (self.random >> 8) as f32 / (1 << 23) as f32 - 1.0;
            match dtype {
                Dtype::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
                Dtype::F32 => bytes.extend(value.to_le_bytes()),
                other => panic!("no values of {other:?}"),
            }
        }
        self.tensors.insert(name.into(), Raw(dtype, shape.to_vec(), bytes));
    }

    /// Replaces the layers' matrices by random FP8 codes with f32 scales per block.
    pub fn in_fp8(&mut self, block: [usize; 2]) {
        let names: Vec<String> = self.tensors.keys().cloned().collect();
        for name in names.iter().filter(|name| name.ends_with("_proj.weight")) {
            let shape = self.tensors[name].1.clone();
            let blocks = [shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])];
            self.add(format!("{name}_scale_inv"), Dtype::F32, &blocks);
            let codes = self.codes(shape.iter().product());
            let finite = codes.into_iter().map(|code| if code & 0x7f == 0x7f { 0 } else { code });
            self.tensors.insert(name.clone(), Raw(Dtype::F8_E4M3, shape, finite.collect()));
        }
        let quantised = format!(
            "  \"quantization_config\": {{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \
             \"weight_block_size\": {block:?}}},\n  \"odd\""
        );
        self.config = self.config.replace("  \"odd\"", &quantised);
    }

    /// Random bytes.
    pub fn codes(&mut self, count: usize) -> Vec<u8> {
        let mut next = || {
            self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.random >> 16) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    /// Writes it as `model.safetensors`.
    pub fn write(&self, dir: &Path) {
        self.write_config(dir);
        save(&self.tensors, &dir.join("model.safetensors"));
    }

    /// Writes it as `shards` files and an index, tensors dealt out in turn.
    pub fn write_sharded(&self, dir: &Path, shards: usize) {
        self.write_config(dir);
        let mut parts = vec![BTreeMap::new(); shards];
        let mut map = serde_json::Map::new();
        for (i, (name, raw)) in self.tensors.iter().enumerate() {
            let shard = i % shards;
            parts[shard].insert(name.clone(), raw.clone());
            let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            map.insert(name.clone(), file.into());
        }
        for (i, part) in parts.iter().enumerate() {
            save(part, &dir.join(format!("model-{:05}-of-{shards:05}.safetensors", i + 1)));
        }
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn write_config(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), &self.config).unwrap();
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        fs::write(dir.join("README.md"), "another model").unwrap();
    }
}

fn save(tensors: &BTreeMap<String, Raw>, path: &Path) {
    let views = tensors.iter().map(|(name, Raw(dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Every tensor of a folder, whatever its files.
pub fn load(dir: &Path) -> BTreeMap<String, Raw> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let raw = Raw(view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(all.insert(name, raw).is_none());
            }
        }
    }
    all
}

fn config(family: &str, more: &str) -> String {
    format!(
        "{{\n  \"architectures\": [\"{family}\"],\n  \"model_type\": \"{family}\",\n  \
         \"num_hidden_layers\": 2,\n{more}  \"odd\": [1.50,\t2E3]\n}}\n"
    )
}

/// Two layers with `names = [gate, up, down]` under `{block}experts.{i}.`.
fn per_expert(tiny: &mut Tiny, layers: usize, block: &str, names: [&str; 3], dtype: Dtype) {
    for layer in 0..layers {
        let block = format!("model.layers.{layer}.{block}");
        for i in 0..N {
            tiny.add(format!("{block}experts.{i}.{}.weight", names[0]), dtype, &[F, D]);
            tiny.add(format!("{block}experts.{i}.{}.weight", names[1]), dtype, &[F, D]);
            tiny.add(format!("{block}experts.{i}.{}.weight", names[2]), dtype, &[D, F]);
        }
        tiny.add(format!("model.layers.{layer}.input_layernorm.weight"), dtype, &[D]);
    }
    tiny.add("model.embed_tokens.weight", dtype, &[11, D]);
}

const QWEN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const W: [&str; 3] = ["w1", "w3", "w2"];
const K2: &str = "  \"num_experts_per_tok\": 2,\n";

/// Two Mixtral layers in bf16, four experts, top-2.
pub fn mixtral() -> Tiny {
    let keys = format!("  \"num_local_experts\": {N},\n{K2}");
    let mut tiny = Tiny::new(config("mixtral", &keys));
    per_expert(&mut tiny, 2, "block_sparse_moe.", W, Dtype::BF16);
    for layer in 0..2 {
        tiny.add(
            format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
            Dtype::BF16,
            &[N, D],
        );
    }
    tiny
}

/// Qwen3-MoE in f16 with the count spelt twice.
pub fn qwen() -> Tiny {
    let keys = format!(
        "  \"num_experts\": {N},\n  \"num_local_experts\": {N},\n{K2}  \"norm_topk_prob\": true,\n"
    );
    let mut tiny = Tiny::new(config("qwen3_moe", &keys));
    per_expert(&mut tiny, 2, "mlp.", QWEN, Dtype::F16);
    for layer in 0..2 {
        tiny.add(format!("model.layers.{layer}.mlp.gate.weight"), Dtype::F16, &[N, D]);
    }
    tiny
}

/// DeepSeek-V3: bf16 experts, f32 router and correction bias, two routing groups, a shared expert,
/// and a multi-token-prediction layer behind the last.
pub fn deepseek() -> Tiny {
    let keys = format!(
        "  \"n_routed_experts\": {N},\n{K2}  \"n_group\": 2,\n  \"topk_group\": 1,\n  \
         \"routed_scaling_factor\": 1.5,\n  \"num_nextn_predict_layers\": 1,\n"
    );
    let mut tiny = Tiny::new(config("deepseek_v3", &keys));
    per_expert(&mut tiny, 3, "mlp.", QWEN, Dtype::BF16);
    for layer in 0..3 {
        let block = format!("model.layers.{layer}.mlp");
        tiny.add(format!("{block}.gate.weight"), Dtype::F32, &[N, D]);
        tiny.add(format!("{block}.gate.e_score_correction_bias"), Dtype::F32, &[N]);
        tiny.add(format!("{block}.shared_experts.up_proj.weight"), Dtype::BF16, &[F, D]);
    }
    tiny
}

/// ERNIE: a correction bias of shape `(1, N)`.
pub fn ernie() -> Tiny {
    let keys = format!("  \"moe_num_experts\": {N},\n  \"moe_k\": 2,\n");
    let mut tiny = Tiny::new(config("ernie4_5_moe", &keys));
    per_expert(&mut tiny, 2, "mlp.", QWEN, Dtype::BF16);
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.mlp");
        tiny.add(format!("{block}.gate.weight"), Dtype::F32, &[N, D]);
        let name = format!("{block}.moe_statics.e_score_correction_bias");
        tiny.add(name, Dtype::F32, &[1, N]);
    }
    tiny
}

/// Jamba's names.
pub fn jamba() -> Tiny {
    let mut tiny = Tiny::new(config("jamba", &format!("  \"num_experts\": {N},\n{K2}")));
    per_expert(&mut tiny, 2, "feed_forward.", QWEN, Dtype::F32);
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.feed_forward.router.weight");
        tiny.add(name, Dtype::F32, &[N, D]);
    }
    tiny
}

/// LFM2's names, with a correction bias.
pub fn lfm2() -> Tiny {
    let mut tiny = Tiny::new(config("lfm2_moe", &format!("  \"num_experts\": {N},\n{K2}")));
    per_expert(&mut tiny, 2, "feed_forward.", W, Dtype::BF16);
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.feed_forward");
        tiny.add(format!("{block}.gate.weight"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.expert_bias"), Dtype::F32, &[N]);
    }
    tiny
}

/// A wrapper with fused experts.
pub fn fused() -> Tiny {
    let keys = format!(
        "  \"text_config\": {{\"model_type\": \"qwen3_5_moe_text\", \"num_experts\":{N}, \
         \"num_experts_per_tok\":2}},\n"
    );
    let mut tiny = Tiny::new(config("qwen3_5_moe", &keys));
    for layer in 0..2 {
        let block = format!("model.language_model.layers.{layer}.mlp");
        tiny.add(format!("{block}.experts.gate_up_proj"), Dtype::BF16, &[N, 2 * F, D]);
        tiny.add(format!("{block}.experts.down_proj"), Dtype::BF16, &[N, D, F]);
        tiny.add(format!("{block}.gate.weight"), Dtype::BF16, &[N, D]);
    }
    tiny.add("model.visual.patch.weight", Dtype::BF16, &[3]);
    tiny
}

/// gpt-oss in bf16: gate and up in turn, transposed, with biases everywhere.
pub fn gpt_oss() -> Tiny {
    let keys = format!("  \"num_local_experts\": {N},\n{K2}  \"experts_per_token\": 2,\n");
    let mut tiny = Tiny::new(config("gpt_oss", &keys));
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.mlp");
        tiny.add(format!("{block}.experts.gate_up_proj"), Dtype::BF16, &[N, D, 2 * F]);
        tiny.add(format!("{block}.experts.gate_up_proj_bias"), Dtype::BF16, &[N, 2 * F]);
        tiny.add(format!("{block}.experts.down_proj"), Dtype::BF16, &[N, F, D]);
        tiny.add(format!("{block}.experts.down_proj_bias"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.router.weight"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.router.bias"), Dtype::BF16, &[N]);
    }
    tiny
}

/// gpt-oss in MXFP4, of width 32 with 64 hidden units, whose config ends in the quantisation.
pub fn gpt_oss_mxfp4() -> Tiny {
    let mut tiny = gpt_oss();
    tiny.tensors.clear();
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.mlp");
        for (name, rows, groups) in [("gate_up_proj", 128, 1), ("down_proj", 32, 2)] {
            let name = format!("{block}.experts.{name}");
            let blocks = tiny.codes(N * rows * groups * 16);
            let scales = tiny.codes(N * rows * groups).into_iter().map(|code| 120 + code % 8);
            let raw = Raw(Dtype::U8, vec![N, rows, groups], scales.collect());
            tiny.tensors.insert(format!("{name}_scales"), raw);
            let raw = Raw(Dtype::U8, vec![N, rows, groups, 16], blocks);
            tiny.tensors.insert(format!("{name}_blocks"), raw);
            tiny.add(format!("{name}_bias"), Dtype::BF16, &[N, rows]);
        }
        tiny.add(format!("{block}.router.weight"), Dtype::BF16, &[N, 32]);
        tiny.add(format!("{block}.router.bias"), Dtype::BF16, &[N]);
    }
    let end = "2E3],\n  \"quantization_config\": {\"quant_method\": \"mxfp4\"}";
    tiny.config = tiny.config.replace("2E3]", end);
    tiny
}

/// Granite's names for fused experts.
pub fn granite() -> Tiny {
    let mut tiny = Tiny::new(config("granitemoe", &format!("  \"num_local_experts\": {N},\n{K2}")));
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.block_sparse_moe");
        tiny.add(format!("{block}.input_linear.weight"), Dtype::F32, &[N, 2 * F, D]);
        tiny.add(format!("{block}.output_linear.weight"), Dtype::F32, &[N, D, F]);
        tiny.add(format!("{block}.router.layer.weight"), Dtype::F32, &[N, D]);
    }
    tiny
}

/// Mixtral with a bias on every projection.
pub fn biased() -> Tiny {
    let mut tiny = mixtral();
    for layer in 0..2 {
        for i in 0..N {
            for (name, rows) in [("w1", F), ("w3", F), ("w2", D)] {
                let block = format!("model.layers.{layer}.block_sparse_moe.experts.{i}");
                tiny.add(format!("{block}.{name}.bias"), Dtype::F32, &[rows]);
            }
        }
    }
    tiny
}

/// Encoder and decoder with two-matrix experts.
pub fn switch() -> Tiny {
    let keys = format!("  \"num_experts\": {N},\n  \"expert_capacity\": 7,\n");
    let mut tiny = Tiny::new(config("switch_transformers", &keys));
    for (stack, layer) in [("encoder", 1), ("decoder", 2)] {
        let block = format!("{stack}.block.1.layer.{layer}.mlp");
        tiny.add(format!("{block}.router.classifier.weight"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.router.classifier.bias"), Dtype::BF16, &[N]);
        for i in 0..N {
            tiny.add(format!("{block}.experts.expert_{i}.wi.weight"), Dtype::BF16, &[F, D]);
            tiny.add(format!("{block}.experts.expert_{i}.wo.weight"), Dtype::BF16, &[D, F]);
        }
    }
    tiny.add("shared.weight", Dtype::BF16, &[11, D]);
    tiny
}

/// One of every layout, with its name.
pub fn all() -> Vec<(&'static str, Tiny)> {
    let mut found = vec![
        ("mixtral", mixtral()),
        ("qwen", qwen()),
        ("qwen", deepseek()),
        ("qwen", ernie()),
        ("jamba", jamba()),
        ("lfm2", lfm2()),
        ("fused", fused()),
        ("granite", granite()),
        ("gpt_oss", gpt_oss()),
        ("mixtral", biased()),
        ("switch", switch()),
    ];
    found.extend(layouts::all());
    found
}
