//! What fuzzing starts from: one small valid input of every kind.

use std::fmt::Write;

use mcsmoe::pipeline::{ExportChoice, Keep, Recipe};
use safetensors::Dtype;

use super::checkpoints::{self, D, F, N, Raw};
use super::{Family, Ground, family};

/// Target, name and bytes of every seed.
pub fn seeds(ground: &Ground) -> Vec<(&'static str, String, Vec<u8>)> {
    let mut found = Vec::new();
    for (i, family) in ground.families.iter().enumerate() {
        let of = |text: &str| [&[b'A' + i as u8], text.as_bytes()].concat();
        if family.header.len() < 4000 {
            found.push(("header", format!("seed-{i:02}"), of(&family.header)));
        }
        found.push(("config", format!("seed-{i:02}"), of(&family.config)));
    }
    let index = ground.dir.join("index/model.safetensors.index.json");
    found.push(("index", "seed".into(), std::fs::read(index).unwrap()));
    let native = &ground.native;
    found.push(("native", "seed-factors".into(), format!("0{}", native.header).into_bytes()));
    found.push(("native", "seed-map".into(), format!("1{}", native.config).into_bytes()));
    for (i, preset) in Recipe::PRESETS.iter().enumerate() {
        let recipe = Recipe::preset(preset, Keep::Fraction(0.5)).unwrap();
        let recipe = if i % 2 == 0 { recipe.export(ExportChoice::Stock) } else { recipe };
        let toml = format!("0{}", recipe.to_toml().unwrap());
        found.push(("recipe", format!("seed-{preset}"), toml.into_bytes()));
    }
    let yaml = "1preset: fast\nkeep: {experts: 2}\ntop_k: 1\n";
    let json = r#"2{"preset":"mc-smoe","keep":{"fraction":0.5},"export":"native","seed":1}"#;
    found.push(("recipe", "seed-yaml".into(), yaml.into()));
    found.push(("recipe", "seed-json".into(), json.into()));
    found.extend(statistics().map(|(name, text)| ("statistics", name.into(), text.into_bytes())));
    found
}

/// A native folder: a router of four rows over two experts, whose projections lie in factors with
/// kept rows, in factors with kept columns, and dense.
pub(super) fn native() -> Family {
    let mut tiny = checkpoints::mixtral();
    tiny.tensors.clear();
    let block = "model.layers.0.block_sparse_moe";
    tiny.add(format!("{block}.gate.weight"), Dtype::F32, &[N, D]);
    for expert in 0..2 {
        let expert = format!("{block}.experts.{expert}");
        for (name, lines, shape) in [("w1", "row", [1, D]), ("w3", "column", [F, 1])] {
            let weight = format!("{expert}.{name}.weight");
            tiny.add(format!("{weight}.left"), Dtype::BF16, &[F, 1]);
            tiny.add(format!("{weight}.right"), Dtype::BF16, &[1, D]);
            tiny.add(format!("{weight}.{lines}s"), Dtype::BF16, &shape);
            let index = Raw(Dtype::I32, vec![1], vec![0; 4]);
            tiny.tensors.insert(format!("{weight}.{lines}_index"), index);
        }
        tiny.add(format!("{expert}.w2.weight"), Dtype::BF16, &[D, F]);
    }
    let map = r#""mcsmoe": {"format": 1, "base_model_type": "mixtral", "expert_map":
        {"layers.0": {"label": [0, 1, 0, 1], "dominant": [0, 1]}}}, "odd""#;
    tiny.config = tiny.config.replace("\"odd\"", map);
    tiny.config = tiny.config.replace("\"model_type\": \"mixtral\"", "\"model_type\": \"mcsmoe\"");
    family(&tiny)
}

/// A file of observed tokens, a file of sums, one of matrices like the experts', and JSON.
fn statistics() -> [(&'static str, String); 4] {
    let json = r#"1{"model_type":"mixtral","layers":{"layers.0":{"tokens":3,"counts":[4,2],
        "router_mass":[2.2,0.8],"logit_gram":[[5.0,1.0],[1.0,2.0]],"expert_out_norm":[1,0.5],
        "reap_saliency":[0.5,0],"expert_mean_output":[[0.5,1.0],[0,1.5]]}}}"#;
    let sums = [
        ("counts", "I64", vec![3]),
        ("logit_gram", "F64", vec![3, 3]),
        ("router_mass", "F64", vec![3]),
        ("expert_mean_output", "F32", vec![3, 2]),
        ("expert_out_norm", "F32", vec![3]),
        ("reap_saliency", "BF16", vec![3]),
    ];
    let matrices = ["grad.gate", "grad.up", "grad.down", "fisher.up", "fisher.down"];
    let matrices = matrices.map(|name| (name, "F16", vec![2, 1, 1]));
    let matrices = [vec![("counts", "I32", vec![2])], matrices.to_vec()].concat();
    let tokens = [
        ("router_logits", "F32", vec![2, 3]),
        ("topk_indices", "I32", vec![2, 1]),
        ("topk_weights", "F32", vec![2, 1]),
        ("moe_input", "BF16", vec![2, 4]),
        ("routed_output", "F32", vec![2, 4]),
    ];
    [
        ("seed-json", json.to_owned()),
        ("seed-sums", stats("layers.1", &sums)),
        ("seed-matrices", stats("encoder.layers.0", &matrices)),
        ("seed-tokens", stats("layers.0", &tokens)),
    ]
}

/// The header of a statistics file.
fn stats(layer: &str, tensors: &[(&str, &str, Vec<usize>)]) -> String {
    let notes = format!(r#"[{{\"name\":\"{layer}\",\"tokens\":2}}]"#);
    let mut text = format!(r#"0{{"__metadata__":{{"model_type":"x","layers":"{notes}"}}"#);
    let mut end = 0;
    for (name, dtype, shape) in tensors {
        let width = match *dtype {
            "I64" | "F64" => 8,
            "F32" | "I32" => 4,
            _ => 2,
        };
        let from = end;
        end += width * shape.iter().product::<usize>();
        let offsets = format!(r#""data_offsets":[{from},{end}]"#);
        let tensor = format!(r#"{{"dtype":"{dtype}","shape":{shape:?},{offsets}}}"#);
        write!(text, r#","{layer}.{name}":{tensor}"#).unwrap();
    }
    text + "}"
}
