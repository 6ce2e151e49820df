//! A source of weights over plain safetensors files, for tests: everything is read at once.

use std::collections::HashMap;
use std::path::Path;

use mcsmoe::error::Locate;
use mcsmoe::model::{
    Activation, Expert, GroupScore, Grouping, LayerId, MergedLayer, Router, RoutingGroups,
    RoutingRule, Score, Stack, TensorSource,
};
use mcsmoe::{ErrorKind, Result};
use ndarray::{Array1, Array2, ArrayD};
use serde_json::Value;

/// All tensors of a folder as `f32`, and its configuration.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub(crate) tensors: HashMap<String, ArrayD<f32>>,
    pub(crate) config: Value,
}

/// Tensors by name.
pub(crate) type Tensors = HashMap<String, ArrayD<f32>>;

/// The tensors of one file, converted to `f32`.
pub(crate) fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let convert = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let words = || data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        let values: Vec<f32> = match view.dtype() {
            safetensors::Dtype::F32 => words().map(f32::from_le_bytes).collect(),
            safetensors::Dtype::I32 => words().map(|b| i32::from_le_bytes(b) as f32).collect(),
            safetensors::Dtype::BF16 => data
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            other => panic!("{name}: {other:?}"),
        };
        (name, ArrayD::from_shape_vec(view.shape(), values).unwrap())
    };
    file.tensors().into_iter().map(convert).collect()
}

impl Folder {
    pub(crate) fn open(dir: &Path) -> Self {
        let config = std::fs::read(dir.join("config.json")).unwrap();
        let mut all = HashMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                all.extend(tensors(&path));
            }
        }
        Self { tensors: all, config: serde_json::from_slice(&config).unwrap() }
    }

    pub(crate) fn family(&self) -> &str {
        self.config["model_type"].as_str().unwrap()
    }

    fn missing<T>(&self, name: &str) -> Result<T> {
        let reason = "there is no such tensor".into();
        Err(ErrorKind::Format { format: "checkpoint", reason }.into()).in_tensor(name)
    }

    fn number(&self, key: &str) -> Option<usize> {
        self.config.get(key).and_then(Value::as_u64).map(|n| n as usize)
    }

    fn block(&self, layer: LayerId) -> String {
        match layer.stack {
            Stack::Causal if self.family() == "mixtral" => {
                format!("model.layers.{}.block_sparse_moe.", layer.index)
            }
            Stack::Causal => format!("model.layers.{}.mlp.", layer.index),
            Stack::Encoder => format!("encoder.block.{}.layer.1.mlp.", layer.index),
            Stack::Decoder => format!("decoder.block.{}.layer.2.mlp.", layer.index),
        }
    }

    fn rule(&self) -> RoutingRule {
        let flag = |key: &str| self.config.get(key).and_then(Value::as_bool).unwrap_or(false);
        let k = self.number("num_experts_per_tok").unwrap_or(1);
        let groups = |score| {
            let groups = self.number("n_group")?;
            Some(RoutingGroups { groups, chosen: self.number("topk_group")?, score })
        };
        let scale = self.config.get("routed_scaling_factor").and_then(Value::as_f64);
        let scale = scale.unwrap_or(1.0) as f32;
        match self.family() {
            "mixtral" => RoutingRule::softmax(k, true),
            "deepseek_v2" => {
                let limited = self.config["topk_method"] == "group_limited_greedy";
                let groups = groups(GroupScore::Max).filter(|_| limited);
                RoutingRule { scale, groups, ..RoutingRule::softmax(k, false) }
            }
            "deepseek_v3" => RoutingRule {
                score: Score::Sigmoid,
                top_k: k,
                renormalise: flag("norm_topk_prob"),
                scale,
                groups: groups(GroupScore::TopTwoSum),
            },
            _ => RoutingRule::softmax(k, flag("norm_topk_prob")),
        }
    }
}

impl TensorSource for Folder {
    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape().to_vec())
    }

    fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.clone().into_dimensionality().unwrap()),
            None => self.missing(name),
        }
    }

    fn vector(&self, name: &str) -> Result<Array1<f32>> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.clone().into_dimensionality().unwrap()),
            None => self.missing(name),
        }
    }

    fn moe(&self, layer: LayerId) -> Result<MergedLayer> {
        let block = self.block(layer);
        let switch = layer.stack != Stack::Causal;
        let names = match self.family() {
            "mixtral" => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        let router = if switch { "router.classifier" } else { "gate" };
        let weight = self.matrix(&format!("{block}{router}.weight"))?;
        let bias = self.vector(&format!("{block}{router}.bias")).ok();
        let correction = self.vector(&format!("{block}gate.e_score_correction_bias")).ok();
        let mut experts = Vec::new();
        for i in 0..weight.nrows() {
            let expert = if switch { format!("expert_{i}") } else { i.to_string() };
            let part = |name: &str| self.matrix(&format!("{block}experts.{expert}.{name}.weight"));
            experts.push(if switch {
                let act = Activation::Relu;
                Expert::new(None, part("wi")?.into(), part("wo")?.into(), act)?
            } else {
                Expert::swiglu(part(names[0])?, part(names[1])?, part(names[2])?)?
            });
        }
        let grouping = Grouping::identity(experts.len());
        let router = Router::new(weight, bias, correction, self.rule())?;
        MergedLayer::new(layer, experts, grouping, router, None)
    }

    fn is_moe(&self, layer: LayerId) -> bool {
        let block = format!("{}experts.", self.block(layer));
        self.tensors.keys().any(|name| name.starts_with(&block))
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn prefix(&self) -> &str {
        if self.family() == "switch_transformers" { "" } else { "model." }
    }
}
