//! Quantised checkpoints: read as what they mean, written dequantised, refused when damaged.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::checkpoints;
use crate::support::checkpoints::{N, Raw, Tiny};
use mcsmoe::checkpoint::{Checkpoint, Export, WritePlan, Writer, Written};
use mcsmoe::model::{Activation, Grouping, LayerId, MergedLayer, Role, RoutingRule, Score};
use mcsmoe::{Error, ErrorKind};
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

/// Divides neither side of a 5 × 6 matrix, nor of its transpose.
const BLOCK: [usize; 2] = [4, 4];

fn fp8(mut tiny: Tiny) -> Tiny {
    tiny.in_fp8(BLOCK);
    tiny
}

fn written(tiny: &Tiny) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("source");
    tiny.write(&dir);
    (root, dir)
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    sign * magnitude
}

/// The values of an FP8 tensor.
fn meant(tiny: &Tiny, name: &str) -> Vec<f32> {
    let Raw(_, shape, codes) = &tiny.tensors[name];
    let Raw(_, blocks, scales) = &tiny.tensors[&format!("{name}_scale_inv")];
    let scales = f32s(scales);
    let value = |(at, &code): (usize, &u8)| {
        let (row, col) = (at / shape[1], at % shape[1]);
        e4m3(code) * scales[row / BLOCK[0] * blocks[1] + col / BLOCK[1]]
    };
    codes.iter().enumerate().map(value).collect()
}

fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
}

/// What the tensors are when every FP8 matrix is written as bf16.
fn plain(tiny: &Tiny) -> BTreeMap<String, Raw> {
    let kept = tiny.tensors.iter().filter(|(name, _)| !name.ends_with("_scale_inv"));
    let plain = kept.map(|(name, raw)| match raw {
        Raw(Dtype::F8_E4M3, shape, _) => {
            (name.clone(), Raw(Dtype::BF16, shape.clone(), bf16(&meant(tiny, name))))
        }
        raw => (name.clone(), raw.clone()),
    });
    plain.collect()
}

fn everywhere(source: &Checkpoint, grouping: &Grouping) -> BTreeMap<LayerId, Grouping> {
    source.layers().iter().map(|l| (l.id, grouping.clone())).collect()
}

/// Experts {0, 2} and {1, 3}; dominant 2 and 1.
fn pairs() -> Grouping {
    Grouping::new(vec![Some(0), Some(1), Some(0), Some(1)], vec![2, 1]).unwrap()
}

/// Keeps the dominants' experts and router rows.
fn export(dir: &Path, target: &Path, plan: impl FnOnce(&Checkpoint) -> WritePlan) -> Written {
    let source = Checkpoint::open(dir).unwrap();
    let plan = plan(&source);
    let mut writer = Writer::create(&source, target, &plan).unwrap();
    for (id, grouping) in &plan.groupings {
        let experts = grouping.dominants().iter().map(|&d| source.read_expert(*id, d).unwrap());
        let router = source.read_router(*id).unwrap();
        let rule = source.layer(*id).unwrap().rule;
        let groups = if plan.flatten_groups { None } else { rule.groups };
        let narrowed = router.select(grouping.dominants(), RoutingRule { groups, ..rule }).ok();
        let merged =
            MergedLayer::new(*id, experts.collect(), grouping.clone(), router, narrowed).unwrap();
        writer.layer(&merged).unwrap();
    }
    writer.finish(&Value::Null).unwrap()
}

#[test]
fn fp8_layers_are_read_as_what_they_mean() {
    for tiny in [fp8(checkpoints::qwen()), fp8(checkpoints::deepseek())] {
        let (_root, dir) = written(&tiny);
        let source = Checkpoint::open(&dir).unwrap();
        for info in source.layers() {
            assert_eq!(info.dtype, "F8_E4M3");
            assert_eq!(info.expert_parameters, (N * 3 * 30) as u64);
            assert_eq!(info.expert_bytes, (N * 3 * (30 + 4 * 4)) as u64);
            let layer = source.read_layer(info.id).unwrap();
            for (i, expert) in layer.experts().iter().enumerate() {
                for (role, linear) in expert.view().linears() {
                    let block = format!("model.{}.mlp.experts.{i}", info.id);
                    let expected = meant(&tiny, &format!("{block}.{role}_proj.weight"));
                    assert!(linear.weight.iter().eq(expected.iter()), "{block} {role}");
                }
            }
            source.release(info.id);
            assert_eq!(source.read_layer(info.id).unwrap(), layer);
        }
        let dense: usize = plain(&tiny).values().map(|raw| raw.1.iter().product::<usize>()).sum();
        assert_eq!(source.total_parameters(), dense as u64);
    }
}

#[test]
fn nothing_merged_writes_the_dequantised_model_in_every_export() {
    for tiny in [fp8(checkpoints::qwen()), fp8(checkpoints::deepseek())] {
        let (root, dir) = written(&tiny);
        for kind in [Export::Stock, Export::Native, Export::Expanded] {
            let target = root.path().join(format!("{kind:?}"));
            let summary = export(&dir, &target, |s| WritePlan {
                shard_bytes: 700,
                ..WritePlan::new(kind, everywhere(s, &Grouping::identity(N)))
            });
            assert!(checkpoints::load(&target) == plain(&tiny), "{kind:?}");
            let scales = tiny.tensors.keys().filter(|name| name.ends_with("_scale_inv"));
            assert!(summary.dropped.iter().map(|(name, _)| name).eq(scales));
            let reason = &summary.dropped[0].1;
            assert!(reason.ends_with("_proj.weight is written dequantised"), "{reason}");
            let config = fs::read_to_string(target.join("config.json")).unwrap();
            assert!(!config.contains("quantization"));
        }
    }
}

#[test]
fn stock_exports_of_quantised_models_are_ordinary_models() {
    for tiny in [fp8(checkpoints::qwen()), fp8(checkpoints::deepseek())] {
        let (root, dir) = written(&tiny);
        let target = root.path().join("target");
        let summary = export(&dir, &target, |s| WritePlan {
            flatten_groups: true,
            ..WritePlan::new(Export::Stock, everywhere(s, &pairs()))
        });
        let small = Checkpoint::open(&target).unwrap();
        assert_eq!(summary.bytes, small.total_bytes());
        assert_eq!(summary.parameters, small.total_parameters());
        let experts: u64 = small.layers().iter().map(|l| l.expert_bytes).sum();
        assert_eq!(summary.expert_bytes, experts);
        assert_eq!(small.layers()[0].dtype, "BF16");
        let plain = plain(&tiny);
        for (name, raw) in checkpoints::load(&target) {
            let original = match name.split_once("experts.") {
                Some((block, rest)) if !block.ends_with("shared_") => {
                    let (slot, rest) = rest.split_once('.').unwrap();
                    let dominant = pairs().dominants()[slot.parse::<usize>().unwrap()];
                    format!("{block}experts.{dominant}.{rest}")
                }
                _ => name.clone(),
            };
            assert!(raw == plain[&original] || name.contains(".gate."), "{name}");
        }
        // Every tensor of the source is in the target, in a merged expert, or accounted for.
        let gone = |name: &str| summary.dropped.iter().any(|(dropped, _)| dropped == name);
        let scales = tiny.tensors.keys().filter(|name| name.ends_with("_scale_inv"));
        assert!(scales.into_iter().all(|name| gone(name)));
        assert!(tiny.tensors.keys().filter(|name| name.contains("layers.2")).all(|n| gone(n)));
    }
}

#[test]
fn layers_that_are_copied_are_dequantised_too() {
    let tiny = fp8(checkpoints::qwen());
    let (root, dir) = written(&tiny);
    let target = root.path().join("target");
    let summary = export(&dir, &target, |s| {
        WritePlan::new(Export::Native, [(s.layers()[0].id, pairs())].into())
    });
    let native = Checkpoint::open(&target).unwrap();
    let (found, plain) = (checkpoints::load(&target), plain(&tiny));
    assert!(found.iter().all(|(n, raw)| n.contains("layers.0") || plain[n] == *raw));
    let experts: u64 = native.layers().iter().map(|l| l.expert_bytes).sum();
    assert_eq!(summary.expert_bytes, experts);
}

/// The values of an MXFP4 tensor, `(N, rows, cols)`.
fn meant_mxfp4(tiny: &Tiny, name: &str) -> Vec<f32> {
    let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let Raw(_, _, blocks) = &tiny.tensors[&format!("{name}_blocks")];
    let Raw(_, _, scales) = &tiny.tensors[&format!("{name}_scales")];
    let value = |at: usize| {
        let code = blocks[at / 2] >> (4 * (at % 2)) & 15;
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        sign * table[usize::from(code & 7)] * 2f32.powi(i32::from(scales[at / 32]) - 127)
    };
    (0..2 * blocks.len()).map(value).collect()
}

#[test]
fn gpt_oss_is_read_from_mxfp4_and_written_transposed_in_bf16() {
    let tiny = checkpoints::gpt_oss_mxfp4();
    let (root, dir) = written(&tiny);
    let source = Checkpoint::open(&dir).unwrap();
    let (d, f) = (32, 64);
    for info in source.layers() {
        assert_eq!((info.d_model, info.d_ff, &*info.dtype), (d, f, "MXFP4"));
        assert_eq!(info.rule.score, Score::SoftmaxOfTopK);
        assert_eq!(info.expert_parameters, (N * (3 * d * f + 2 * f + d)) as u64);
        let block = format!("model.{}.mlp.experts", info.id);
        let gate_up = meant_mxfp4(&tiny, &format!("{block}.gate_up_proj"));
        let down = meant_mxfp4(&tiny, &format!("{block}.down_proj"));
        let Raw(_, _, bias) = &tiny.tensors[&format!("{block}.gate_up_proj_bias")];
        for i in 0..N {
            let expert = source.read_expert(info.id, i).unwrap();
            let expert = expert.view();
            assert!(matches!(expert.activation, Activation::ClampedSwiglu { .. }));
            for (first, role) in [(0, Role::Gate), (1, Role::Up)] {
                let linear = expert.linear(role).unwrap();
                for ((row, col), value) in linear.weight.indexed_iter() {
                    assert_eq!(*value, gate_up[(i * 2 * f + 2 * row + first) * d + col]);
                }
                let at = 2 * (i * 2 * f + 2 * 5 + first);
                let expected = half::bf16::from_le_bytes([bias[at], bias[at + 1]]).to_f32();
                assert_eq!(linear.bias.unwrap()[5], expected);
            }
            assert!(expert.down.weight.iter().eq(&down[i * d * f..(i + 1) * d * f]));
        }
    }
    for (kind, merged) in [(Export::Stock, true), (Export::Stock, false), (Export::Native, true)] {
        let target = root.path().join(format!("{kind:?}{merged}"));
        let summary = export(&dir, &target, |s| {
            let identity = everywhere(s, &Grouping::identity(N));
            let some = if kind == Export::Stock { identity } else { BTreeMap::new() };
            WritePlan::new(kind, if merged { some } else { BTreeMap::new() })
        });
        let plain = Checkpoint::open(&target).unwrap();
        assert_eq!((plain.layout(), summary.dropped.len()), ("gpt_oss", 4));
        assert_eq!(summary.expert_bytes, 2 * plain.layers()[0].expert_bytes);
        assert_eq!(plain.total_parameters(), source.total_parameters());
        for info in source.layers() {
            // Four significant bits and a power of two: bf16 holds them.
            assert_eq!(plain.read_layer(info.id).unwrap(), source.read_layer(info.id).unwrap());
        }
        let found = checkpoints::load(&target);
        let shape = &found["model.layers.1.mlp.experts.gate_up_proj"].1;
        assert_eq!(*shape, [N, d, 2 * f]);
        let config = fs::read_to_string(target.join("config.json")).unwrap();
        let mxfp4 = ",\n  \"quantization_config\": {\"quant_method\": \"mxfp4\"}";
        assert!(kind == Export::Native || config == tiny.config.replace(mxfp4, ""));
    }
    let target = root.path().join("small");
    export(&dir, &target, |s| WritePlan::new(Export::Stock, everywhere(s, &pairs())));
    let small = Checkpoint::open(&target).unwrap();
    let layer = small.read_layer(LayerId::causal(1)).unwrap();
    assert_eq!(layer.experts()[0], source.read_expert(LayerId::causal(1), 2).unwrap());
}

const WEIGHT: &str = "model.layers.1.mlp.experts.2.up_proj.weight";
const SCALE: &str = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv";

fn changed(change: impl FnOnce(&mut Tiny)) -> (TempDir, PathBuf) {
    let mut tiny = fp8(checkpoints::qwen());
    change(&mut tiny);
    written(&tiny)
}

fn opened(change: impl FnOnce(&mut Tiny)) -> Error {
    Checkpoint::open(changed(change).1).unwrap_err()
}

fn set(tiny: &mut Tiny, name: &str, at: usize, bytes: &[u8]) {
    tiny.tensors.get_mut(name).unwrap().2[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn scales_that_do_not_fit_are_refused_with_their_place() {
    let missing = opened(|t| drop(t.tensors.remove(SCALE)));
    assert!(matches!(missing.kind(), ErrorKind::Format { .. }), "{missing}");
    assert!(missing.to_string().contains(SCALE), "{missing}");
    assert_eq!(missing.place().tensor.as_deref(), Some(WEIGHT));
    for shape in [&[1, 2][..], &[2, 1], &[2], &[2, 2, 1]] {
        let wrong = opened(|t| t.add(SCALE, Dtype::F32, shape));
        assert!(matches!(wrong.kind(), ErrorKind::Shape { .. }), "{wrong}");
        assert_eq!(wrong.place().tensor.as_deref(), Some(SCALE));
    }
    let integers = opened(|t| {
        t.tensors.insert(SCALE.into(), Raw(Dtype::I16, vec![2, 2], vec![0; 8]));
    });
    assert!(matches!(integers.kind(), ErrorKind::Unsupported { .. }), "{integers}");
    let default = opened(|t| t.config = t.config.replace("weight_block_size", "other"));
    assert!(matches!(default.kind(), ErrorKind::Shape { .. }), "{default}");
    let zero = opened(|t| t.config = t.config.replace("[4, 4]", "[0, 4]"));
    assert!(matches!(zero.kind(), ErrorKind::Config { .. }), "{zero}");
    assert!(zero.place().file.as_ref().unwrap().ends_with("config.json"));
    let orphan = opened(|t| drop(t.tensors.remove(WEIGHT)));
    assert!(matches!(orphan.kind(), ErrorKind::Unsupported { .. }), "{orphan}");
    assert_eq!(orphan.place().tensor.as_deref(), Some(SCALE));
}

#[test]
fn values_that_are_not_finite_are_refused_when_read_and_when_copied() {
    type Change = fn(&mut Tiny);
    let cases: [(&str, Change, usize); 4] = [
        (WEIGHT, |t| set(t, WEIGHT, 7, &[0xff]), 7),
        (SCALE, |t| set(t, SCALE, 4, &f32::INFINITY.to_le_bytes()), 1),
        (
            SCALE,
            |t| {
                let raw = Raw(Dtype::U8, vec![2, 2], vec![127, 0, 255, 254]);
                t.tensors.insert(SCALE.into(), raw);
            },
            2,
        ),
        (
            WEIGHT,
            |t| {
                set(t, SCALE, 12, &f32::MAX.to_le_bytes());
                set(t, WEIGHT, 29, &[0x7e]);
            },
            29,
        ),
    ];
    for (tensor, change, index) in cases {
        let (root, dir) = changed(change);
        let source = Checkpoint::open(&dir).unwrap();
        source.read_layer(LayerId::causal(0)).unwrap();
        let read = source.read_layer(LayerId::causal(1)).unwrap_err();
        assert_eq!(
            (read.place().expert, read.place().layer.as_deref()),
            (Some(2), Some("layers.1"))
        );
        let plan = WritePlan::new(Export::Native, BTreeMap::new());
        let copied = Writer::create(&source, &root.path().join("target"), &plan).unwrap_err();
        for error in [read, copied] {
            assert!(
                matches!(error.kind(), ErrorKind::NotFinite { index: i, .. } if *i == index),
                "{error}"
            );
            assert_eq!(error.place().tensor.as_deref(), Some(tensor));
            assert_eq!(error.place().file.as_deref(), Some(&*dir.join("model.safetensors")));
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "left something behind");
    }
}

#[test]
fn scales_that_are_powers_of_two_are_read() {
    for dtype in [Dtype::U8, Dtype::F8_E8M0] {
        let (_root, dir) = changed(|t| {
            t.tensors.insert(SCALE.into(), Raw(dtype, vec![2, 2], vec![127, 130, 100, 127]));
            set(t, WEIGHT, 0, &[0x38; 30]);
        });
        let source = Checkpoint::open(&dir).unwrap();
        let expert = source.read_expert(LayerId::causal(1), 2).unwrap();
        let up = expert.view().up.weight;
        let corners = [up[[0, 0]], up[[3, 4]], up[[4, 3]], up[[4, 5]]];
        assert_eq!(corners, [1.0, 8.0, 2f32.powi(-27), 1.0]);
    }
}

#[test]
fn unknown_methods_cannot_be_undone() {
    let (root, dir) = changed(|t| t.config = t.config.replace("\"fp8\"", "\"awq\""));
    let source = Checkpoint::open(&dir).unwrap();
    let plan = WritePlan::new(Export::Native, BTreeMap::new());
    let error = Writer::create(&source, &root.path().join("target"), &plan).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("awq"), "{error}");
}

#[test]
fn damaged_mxfp4_is_refused_with_its_place() {
    let opened = |change: fn(&mut Tiny)| {
        let mut tiny = checkpoints::gpt_oss_mxfp4();
        change(&mut tiny);
        let (_root, dir) = written(&tiny);
        Checkpoint::open(&dir).and_then(|s| s.read_layer(LayerId::causal(0))).unwrap_err()
    };
    const BLOCKS: &str = "model.layers.0.mlp.experts.down_proj_blocks";
    const SCALES: &str = "model.layers.0.mlp.experts.down_proj_scales";
    let missing = opened(|t| drop(t.tensors.remove(SCALES)));
    assert!(matches!(missing.kind(), ErrorKind::Format { .. }), "{missing}");
    let shape = opened(|t| t.tensors.get_mut(SCALES).unwrap().1 = vec![N, 64, 1]);
    assert!(matches!(shape.kind(), ErrorKind::Shape { .. }), "{shape}");
    let group = opened(|t| t.tensors.get_mut(BLOCKS).unwrap().1 = vec![N, 32, 4, 8]);
    assert_eq!(
        (group.place().tensor.as_deref(), shape.place().tensor.as_deref()),
        (Some(BLOCKS), Some(SCALES))
    );
    let nan = opened(|t| set(t, SCALES, 64 + 3, &[255]));
    assert!(matches!(nan.kind(), ErrorKind::NotFinite { index: 67, .. }), "{nan}");
    assert_eq!((nan.place().expert, nan.place().tensor.as_deref()), (Some(1), Some(SCALES)));
    let infinite = opened(|t| {
        set(t, SCALES, 3, &[254]);
        set(t, BLOCKS, 3 * 16, &[0x77]);
    });
    assert!(matches!(infinite.kind(), ErrorKind::NotFinite { index: 96, .. }), "{infinite}");
    let twice = opened(|t| {
        t.add("model.layers.0.mlp.experts.down_proj", Dtype::BF16, &[N, 64, 32]);
    });
    assert!(matches!(twice.kind(), ErrorKind::Format { .. }), "{twice}");
    let narrow = opened(|t| {
        t.add("model.layers.0.mlp.experts.gate_up_proj_bias", Dtype::BF16, &[N, 127]);
    });
    assert!(matches!(narrow.kind(), ErrorKind::Shape { .. }), "{narrow}");
}
