//! Folders as people have them: what is missing is named, what belongs to others is left alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::checkpoints;
use crate::support::checkpoints::{D, F, Raw, Tiny};
use mcsmoe::checkpoint::{Checkpoint, Export, WritePlan, Writer};
use mcsmoe::model::{Grouping, LayerId, MergedLayer};
use mcsmoe::{Error, ErrorKind};
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

fn written(tiny: &Tiny) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("source");
    tiny.write(&dir);
    (root, dir)
}

/// Opens a changed Qwen3-MoE.
fn refused(change: impl FnOnce(&mut Tiny)) -> Error {
    let mut tiny = checkpoints::qwen();
    change(&mut tiny);
    let (_root, dir) = written(&tiny);
    Checkpoint::open(&dir).unwrap_err()
}

fn renamed(tiny: &mut Tiny, name: impl Fn(&str) -> String) {
    let tensors = std::mem::take(&mut tiny.tensors);
    tiny.tensors = tensors.into_iter().map(|(old, raw)| (name(&old), raw)).collect();
}

#[test]
fn a_layer_that_is_not_recognised_is_an_error() {
    let layer = "model.layers.1.";
    let bank = refused(|t| {
        renamed(t, |name| match name.starts_with(layer) {
            true => name.replace(".experts.", ".expert_bank.").replace("gate.weight", "r.weight"),
            false => name.to_owned(),
        });
    });
    assert!(matches!(bank.kind(), ErrorKind::Config { .. }), "{bank}");
    assert!(bank.to_string().contains("layer 1 (mlp.expert_bank."), "{bank}");
    let gone = refused(|t| t.tensors.retain(|name, _| !name.starts_with(layer)));
    assert!(gone.to_string().contains("none of layer 1"), "{gone}");
    let beyond = refused(|t| t.config = t.config.replace("layers\": 2", "layers\": 1"));
    assert!(beyond.to_string().contains("also layer 1"), "{beyond}");
    let dense = refused(|t| {
        let keys = "\"decoder_sparse_step\": 1, \"mlp_only_layers\": [],\n  \"odd\"";
        t.config = t.config.replace("\"odd\"", keys);
        t.tensors.retain(|name, _| !name.starts_with(&format!("{layer}mlp.")));
    });
    assert!(dense.to_string().contains("none in layer 1"), "{dense}");
}

/// Writes a target that keeps experts 2 and 1 of every layer.
fn write(dir: &Path, target: &Path) -> Vec<(String, String)> {
    let source = Checkpoint::open(dir).unwrap();
    let grouping = Grouping::new(vec![None, Some(1), Some(0), None], vec![2, 1]).unwrap();
    let groupings: BTreeMap<LayerId, Grouping> =
        source.layers().iter().map(|l| (l.id, grouping.clone())).collect();
    let plan = WritePlan::new(Export::Native, groupings);
    let mut writer = Writer::create(&source, target, &plan).unwrap();
    for layer in source.layers() {
        let experts = [2, 1].map(|e| source.read_expert(layer.id, e).unwrap());
        let router = source.read_router(layer.id).unwrap();
        let merged =
            MergedLayer::new(layer.id, experts.into(), grouping.clone(), router, None).unwrap();
        writer.layer(&merged).unwrap();
    }
    writer.finish(&Value::Null).unwrap().dropped
}

#[test]
fn other_towers_are_copied_however_deep() {
    let mut tiny = checkpoints::qwen();
    for layer in 0..5 {
        let name = format!("model.qwen2_model.model.layers.{layer}.mlp.up_proj.weight");
        tiny.add(name, Dtype::F16, &[F, D]);
    }
    // A tower with experts of its own, which is not as deep as the config says.
    tiny.add("talker.model.layers.0.mlp.experts.0.up_proj.weight", Dtype::F16, &[F, D]);
    let (root, dir) = written(&tiny);
    let target = root.path().join("target");
    assert_eq!(write(&dir, &target), []);
    let kept = checkpoints::load(&target);
    for name in tiny.tensors.keys().filter(|name| !name.starts_with("model.layers.")) {
        assert_eq!(kept.get(name), tiny.tensors.get(name), "{name}");
    }
}

#[test]
fn prediction_is_left_out_under_any_of_its_names() {
    for prefix in ["mtp.", "mtp_block.", "model.nextn.", "eagle.", "language_model.mtp."] {
        let mut tiny = checkpoints::qwen();
        let layer: Vec<(String, Raw)> = tiny
            .tensors
            .iter()
            .filter_map(|(name, raw)| {
                let rest = name.strip_prefix("model.layers.1.")?;
                Some((format!("{prefix}layers.0.{rest}"), raw.clone()))
            })
            .collect();
        let count = layer.len();
        tiny.tensors.extend(layer);
        let (root, dir) = written(&tiny);
        assert_eq!(write(&dir, &root.path().join("target")).len(), count, "{prefix}");
    }
}

#[test]
fn files_that_are_no_weights_travel_and_verify_looks_for_them() {
    let (root, dir) = written(&checkpoints::qwen());
    for name in ["LICENSE", "modelling_odd.py", "odd_utils.py", "additional_chat_templates/t.jinja"]
    {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    fs::write(dir.join("pytorch_model.bin"), "weights").unwrap();
    let target = root.path().join("target");
    write(&dir, &target);
    assert_eq!(fs::read_to_string(target.join("odd_utils.py")).unwrap(), "odd_utils.py");
    assert!(target.join("additional_chat_templates/t.jinja").is_file());
    assert!(!target.join("pytorch_model.bin").exists());
    let checks = |target: &Path| {
        let found = mcsmoe::pipeline::verify(target, Some(&dir)).unwrap();
        format!("{:?}", found.checks)
    };
    assert!(!checks(&target).contains("LICENSE"));
    fs::remove_file(target.join("LICENSE")).unwrap();
    assert!(checks(&target).contains("LICENSE: the source has it"), "{}", checks(&target));
}

#[test]
fn experts_of_different_types_are_written_in_one_that_holds_all() {
    let mut tiny = checkpoints::qwen();
    let name = "model.layers.0.mlp.experts.3.up_proj.weight";
    tiny.add(name, Dtype::BF16, &[F, D]);
    let (root, dir) = written(&tiny);
    let target = root.path().join("target");
    write(&dir, &target);
    let kept = checkpoints::load(&target);
    let of = |layer: usize, role: &str| {
        kept[&format!("model.layers.{layer}.mlp.experts.0.{role}.weight")].0
    };
    assert_eq!((of(0, "up_proj"), of(0, "gate_proj")), (Dtype::F32, Dtype::F16));
    assert_eq!(of(1, "up_proj"), Dtype::F16);
}

#[test]
fn all_missing_shards_are_named_at_once() {
    let root = tempfile::tempdir().unwrap();
    checkpoints::mixtral().write_sharded(root.path(), 3);
    let mut names = Vec::new();
    for entry in fs::read_dir(root.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    names.iter().take(2).for_each(|name| fs::remove_file(root.path().join(name)).unwrap());
    let error = Checkpoint::open(root.path()).unwrap_err().to_string();
    assert!(names[..2].iter().all(|name| error.contains(name)), "{error}");
    assert!(error.contains("2 of its 3 files are missing"), "{error}");
}
