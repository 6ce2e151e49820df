//! Checkpoints in and out: every layout, every export, and folders that must be refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::checkpoints;
use crate::support::checkpoints::{D, F, N, Raw, Tiny};
use mcsmoe::checkpoint::{Checkpoint, Export, Factoring, LayerInfo, WritePlan, Writer, Written};
use mcsmoe::model::{Expert, Factored, Grouping, LayerId, MergedLayer, RoutingRule, Structure};
use mcsmoe::stage::{Kept, RankBudget};
use mcsmoe::{Error, ErrorKind, Result};
use ndarray::ArrayView2;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

fn written(tiny: &Tiny) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("source");
    tiny.write(&dir);
    (root, dir)
}

fn groupings(source: &Checkpoint, grouping: &Grouping) -> BTreeMap<LayerId, Grouping> {
    source.layers().iter().map(|l| (l.id, grouping.clone())).collect()
}

/// Experts {0, 2} and {1, 3}; dominant 2 and 1.
fn pairs() -> Grouping {
    Grouping::new(vec![Some(0), Some(1), Some(0), Some(1)], vec![2, 1]).unwrap()
}

/// Keeps the dominants' experts and router rows.
fn keep_dominants(source: &Checkpoint, plan: &WritePlan, id: LayerId) -> MergedLayer {
    let grouping = plan.groupings[&id].clone();
    let experts = grouping.dominants().iter().map(|&d| source.read_expert(id, d).unwrap());
    let router = source.read_router(id).unwrap();
    let rule = source.layer(id).unwrap().rule;
    let groups = if plan.flatten_groups { None } else { rule.groups };
    let rule = RoutingRule { top_k: plan.top_k.unwrap_or(rule.top_k), groups, ..rule };
    let narrowed = router.select(grouping.dominants(), rule).ok();
    MergedLayer::new(id, experts.collect(), grouping, router, narrowed).unwrap()
}

fn export(source: &Path, target: &Path, plan: impl FnOnce(&Checkpoint) -> WritePlan) -> Written {
    let source = Checkpoint::open(source).unwrap();
    let plan = plan(&source);
    let mut writer = Writer::create(&source, target, &plan).unwrap();
    for id in plan.groupings.keys() {
        writer.layer(&keep_dominants(&source, &plan, *id)).unwrap();
    }
    writer.finish(&json!({ "report": 1 })).unwrap()
}

#[test]
fn every_layout_is_recognised_and_read() {
    for (layout, tiny) in checkpoints::all() {
        let (_root, dir) = written(&tiny);
        let source = Checkpoint::open(&dir).unwrap();
        assert_eq!(source.layout(), layout);
        assert_eq!(source.layers().len(), 2, "{}", source.family());
        assert_eq!(source.tensors().count(), tiny.tensors.len());
        for info in source.layers() {
            assert_eq!((info.experts, info.d_model, info.d_ff), (N, D, F));
            let layer = source.read_layer(info.id).unwrap();
            let parameters: usize = layer.experts().iter().map(|e| e.parameters()).sum();
            assert_eq!(info.expert_parameters, parameters as u64);
            assert!(source.read_merged(info.id).unwrap().grouping.is_identity());
            source.release(info.id);
            assert_eq!(source.read_layer(info.id).unwrap(), layer);
        }
    }
}

#[test]
fn fused_experts_are_gate_rows_first() {
    let tiny = checkpoints::fused();
    let (_root, dir) = written(&tiny);
    let source = Checkpoint::open(&dir).unwrap();
    let expert = source.read_expert(LayerId::causal(1), 2).unwrap();
    let Raw(_, _, bytes) = &tiny.tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"];
    let value =
        |flat: usize| half::bf16::from_le_bytes([bytes[2 * flat], bytes[2 * flat + 1]]).to_f32();
    let at = |row: usize, col: usize| value((2 * 2 * F + row) * D + col);
    assert_eq!(expert.view().gate.unwrap().weight[[3, 4]], at(3, 4));
    assert_eq!(expert.view().up.weight[[3, 4]], at(F + 3, 4));
}

/// A bf16 tensor's value.
fn bf16(tiny: &Tiny, name: &str, flat: usize) -> f32 {
    let Raw(dtype, _, bytes) = &tiny.tensors[name];
    assert_eq!(*dtype, Dtype::BF16);
    half::bf16::from_le_bytes([bytes[2 * flat], bytes[2 * flat + 1]]).to_f32()
}

#[test]
fn transposed_and_flat_experts_are_taken_apart_as_their_runtimes_do() {
    let (expert, row, col) = (2, 3, 4);
    let taken = |tiny: &Tiny| {
        let (_root, dir) = written(tiny);
        let expert = Checkpoint::open(&dir).unwrap().read_expert(LayerId::causal(1), expert);
        let expert = expert.unwrap();
        let view = expert.view();
        // Of down the same value of the transpose.
        let at = [view.gate.unwrap(), view.up].map(|linear| linear.weight[[row, col]]);
        [at[0], at[1], view.down.weight[[col, row]]]
    };
    let tiny = checkpoints::layouts::llama4();
    let block = "language_model.model.layers.1.feed_forward.experts";
    let gate_up = |at| bf16(&tiny, &format!("{block}.gate_up_proj"), at);
    let half = (expert * D + col) * 2 * F + row;
    let down = bf16(&tiny, &format!("{block}.down_proj"), (expert * F + row) * D + col);
    assert_eq!(taken(&tiny), [gate_up(half), gate_up(half + F), down]);
    let tiny = checkpoints::layouts::dbrx();
    let at = (expert * F + row) * D + col;
    let flat = |name| bf16(&tiny, &format!("transformer.blocks.1.ffn.experts.mlp.{name}"), at);
    assert_eq!(taken(&tiny), ["w1", "v1", "w2"].map(flat));
}

#[test]
fn experts_of_flat_and_fused_tensors_that_do_not_fit_are_refused() {
    let mut flat = checkpoints::layouts::dbrx();
    let name = "transformer.blocks.1.ffn.experts.mlp.v1";
    flat.add(name, Dtype::BF16, &[N * F + 1, D]);
    let mut missing = checkpoints::layouts::dbrx();
    missing.tensors.remove(name);
    let mut half = checkpoints::layouts::llama4();
    let down = "language_model.model.layers.0.feed_forward.experts.down_proj";
    half.add(down, Dtype::BF16, &[N, F + 2, D]);
    let place = |tiny: &Tiny| {
        let (_root, dir) = written(tiny);
        let error = Checkpoint::open(&dir).unwrap_err();
        (error.place().tensor.clone(), error.place().layer.clone())
    };
    assert_eq!(place(&flat), (Some(name.into()), Some("layers.1".into())));
    assert_eq!(place(&missing), (None, Some("layers.1".into())));
    assert_eq!(place(&half), (Some(down.into()), Some("layers.0".into())));
}

#[test]
fn shards_and_a_single_file_read_the_same() {
    let tiny = checkpoints::deepseek();
    let (root, dir) = written(&tiny);
    let sharded = root.path().join("sharded");
    tiny.write_sharded(&sharded, 3);
    let (one, many) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&sharded).unwrap());
    assert_eq!(one.layers(), many.layers());
    for info in one.layers() {
        assert_eq!(one.read_layer(info.id).unwrap(), many.read_layer(info.id).unwrap());
    }
}

#[test]
fn nothing_merged_is_bit_identical_in_every_export() {
    for (_, mut tiny) in checkpoints::all() {
        negative_zero(&mut tiny);
        let (root, dir) = written(&tiny);
        for kind in [Export::Stock, Export::Native, Export::Expanded] {
            let target = root.path().join(format!("{kind:?}"));
            export(&dir, &target, |s| {
                let groupings = groupings(s, &Grouping::identity(N));
                WritePlan { shard_bytes: 700, ..WritePlan::new(kind, groupings) }
            });
            assert_eq!(checkpoints::load(&target), tiny.tensors);
            let config = fs::read_to_string(target.join("config.json")).unwrap();
            assert_eq!(config == tiny.config, kind != Export::Native);
        }
    }
}

/// Puts −0 first in every tensor.
fn negative_zero(tiny: &mut Tiny) {
    for Raw(dtype, _, bytes) in tiny.tensors.values_mut() {
        let size = if *dtype == Dtype::F32 { 4 } else { 2 };
        bytes[..size].fill(0);
        bytes[size - 1] = 0x80;
    }
}

#[test]
fn stock_folders_narrow_everything_of_size_n() {
    for (layout, tiny) in checkpoints::all() {
        let (root, dir) = written(&tiny);
        let target = root.path().join("target");
        let summary = export(&dir, &target, |s| {
            let plan = WritePlan::new(Export::Stock, groupings(s, &pairs()));
            WritePlan { flatten_groups: true, ..plan }
        });
        let (source, small) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&target).unwrap());
        assert_eq!(small.layout(), layout);
        assert_eq!(summary.bytes, small.total_bytes());
        assert_eq!(summary.parameters, small.total_parameters());
        let experts: u64 = small.layers().iter().map(|l| l.expert_bytes).sum();
        assert_eq!(summary.expert_bytes, experts);
        for info in small.layers() {
            let layer = small.read_layer(info.id).unwrap();
            assert_eq!(layer.experts().len(), 2);
            assert_eq!(layer.experts()[0], source.read_expert(info.id, 2).unwrap());
            let router = source.read_router(info.id).unwrap();
            assert_eq!(layer.router().weight().row(0), router.weight().row(2));
            assert_eq!(
                layer.router().correction().map(|c| c[1]),
                router.correction().map(|c| c[1])
            );
        }
        assert!(!target.join("README.md").exists() && target.join("tokenizer.json").exists());
    }
}

#[test]
fn config_edits_touch_counts_and_nothing_else() {
    let edited = |tiny: &Tiny| {
        let (root, dir) = written(tiny);
        let target = root.path().join("target");
        export(&dir, &target, |s| {
            let plan = WritePlan::new(Export::Stock, groupings(s, &pairs()));
            WritePlan { flatten_groups: true, ..plan }
        });
        fs::read_to_string(target.join("config.json")).unwrap()
    };
    let qwen = checkpoints::qwen();
    assert_eq!(edited(&qwen), qwen.config.replace("experts\": 4", "experts\": 2"));
    let switch = checkpoints::switch();
    let expected = switch.config.replace("experts\": 4", "experts\": 2");
    assert_eq!(edited(&switch), expected.replace("capacity\": 7", "capacity\": 14"));
    let fused = checkpoints::fused();
    assert_eq!(edited(&fused), fused.config.replace("experts\":4", "experts\":2"));
    let dbrx = checkpoints::layouts::dbrx();
    assert_eq!(edited(&dbrx), dbrx.config.replace("experts\": 4", "experts\": 2"));
    let deepseek = checkpoints::deepseek();
    let expected = deepseek.config.replace("experts\": 4", "experts\": 2");
    let expected = expected.replace("n_group\": 2", "n_group\": 1");
    let expected = expected.replace("predict_layers\": 1", "predict_layers\": 0");
    assert_eq!(edited(&deepseek), expected);
}

#[test]
fn top_k_is_lowered_under_its_own_name() {
    let tiny = checkpoints::ernie();
    let (root, dir) = written(&tiny);
    let target = root.path().join("target");
    let one = Grouping::new(vec![Some(0); N], vec![3]).unwrap();
    export(&dir, &target, |s| {
        let plan = WritePlan::new(Export::Stock, groupings(s, &one));
        WritePlan { top_k: Some(1), ..plan }
    });
    let small = Checkpoint::open(&target).unwrap();
    assert_eq!((small.layers()[0].experts, small.layers()[0].rule.top_k), (1, 1));
    let config = fs::read_to_string(target.join("config.json")).unwrap();
    assert!(config.contains("\"moe_k\": 1") && !config.contains("num_experts_per_tok"));
}

#[test]
fn native_folders_read_back_with_their_map() {
    for (_, tiny) in checkpoints::all() {
        let (root, dir) = written(&tiny);
        let target = root.path().join("target");
        // Another number of experts in the first layer, one expert dropped, the last untouched.
        let grouping = Grouping::new(vec![Some(1), None, Some(0), Some(1)], vec![2, 3]).unwrap();
        export(&dir, &target, |s| {
            let first = s.layers()[0].id;
            WritePlan::new(Export::Native, [(first, grouping.clone())].into())
        });
        let (source, native) =
            (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&target).unwrap());
        assert!(native.is_native());
        assert_eq!(native.family(), source.family());
        let [first, last] = [0, 1].map(|i| native.layers()[i].id);
        let merged = native.read_merged(first).unwrap();
        assert_eq!((merged.experts.len(), &merged.grouping), (2, &grouping));
        assert_eq!(merged.router, source.read_router(first).unwrap());
        assert_eq!(merged.experts[1], source.read_expert(first, 3).unwrap());
        assert_eq!(native.read_layer(last).unwrap(), source.read_layer(last).unwrap());
        let config: Value =
            serde_json::from_slice(&fs::read(target.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["model_type"], "mcsmoe");
        let class = &config["auto_map"]["AutoModelForCausalLM"];
        assert_eq!(class, "modeling_mcsmoe.McsmoeForCausalLM");
        let manifest: Value =
            serde_json::from_slice(&fs::read(target.join("mcsmoe.json")).unwrap()).unwrap();
        let code = fs::read(target.join("modeling_mcsmoe.py")).unwrap();
        assert_eq!(manifest["files"]["modeling_mcsmoe.py"]["bytes"], code.len());
        assert_eq!(config["mcsmoe"]["base_model_type"], source.family());
        let refused = Writer::create(&native, &root.path().join("again"), &plan_of(&native));
        assert!(matches!(refused.unwrap_err().kind(), ErrorKind::Unsupported { .. }));
    }
}

#[test]
fn native_folders_run_their_own_code_and_remember_the_originals() {
    let mut tiny = checkpoints::mixtral();
    let theirs = r#""auto_map": {"AutoConfig": "x.Y"},"#;
    tiny.config = tiny.config.replace("  \"odd\"", &format!("  {theirs}\n  \"odd\""));
    let (root, dir) = written(&tiny);
    let folder = |kind| {
        let target = root.path().join(format!("{kind:?}"));
        export(&dir, &target, |s| WritePlan::new(kind, groupings(s, &pairs())));
        let config = fs::read_to_string(target.join("config.json")).unwrap();
        (config.contains(theirs), target.join("modeling_mcsmoe.py").exists())
    };
    assert_eq!(folder(Export::Stock), (true, false));
    assert_eq!(folder(Export::Expanded), (true, false));
    assert_eq!(folder(Export::Native), (false, true));
    let config = fs::read(root.path().join("Native/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["auto_map"]["AutoConfig"], "modeling_mcsmoe.McsmoeConfig");
    assert_eq!(config["mcsmoe"]["base_auto_map"]["AutoConfig"], "x.Y");
}

#[test]
fn counts_are_edited_under_every_familys_own_keys() {
    let one = Grouping::new(vec![Some(0); N], vec![3]).unwrap();
    for (layout, tiny) in checkpoints::all() {
        let (root, dir) = written(&tiny);
        let target = root.path().join("target");
        let source = Checkpoint::open(&dir).unwrap();
        let plan = |top_k| WritePlan {
            top_k,
            flatten_groups: true,
            ..WritePlan::new(Export::Stock, groupings(&source, &one))
        };
        if layout == "nllb" {
            // Its code has no other number.
            for top_k in [None, Some(1)] {
                assert!(Writer::create(&source, &target, &plan(top_k)).is_err());
            }
            continue;
        }
        export(&dir, &target, |_| plan(Some(1)));
        let small = Checkpoint::open(&target).unwrap();
        assert!(small.layers().iter().all(|l| (l.experts, l.rule.top_k) == (1, 1)), "{layout}");
        let keys = |dir: &Path| {
            let text = fs::read_to_string(dir.join("config.json")).unwrap();
            text.matches("\":").count()
        };
        assert_eq!(keys(&target), keys(&dir), "{layout}");
    }
}

fn plan_of(source: &Checkpoint) -> WritePlan {
    WritePlan::new(Export::Stock, groupings(source, &pairs()))
}

/// Every row kept and a rank of 0: factors that are exact in every data type.
fn all_rows(expert: &Expert) -> Vec<Option<Factored>> {
    let whole = |weight: ArrayView2<'_, f32>| {
        let index = (0..weight.nrows() as u32).collect();
        Some(Factored::sparse(weight.dim(), Structure::Rows, index, weight.to_owned()).unwrap())
    };
    expert.view().linears().map(|(_, linear)| whole(linear.weight)).collect()
}

#[test]
fn native_folders_hold_factors_where_projections_have_tensors_of_their_own() {
    let rows = |rows| {
        let (budget, structure) = (RankBudget { rank: 1, rows }, Structure::Rows);
        Kept::Factors { budget, structure }
    };
    let factoring = |l: &LayerInfo| {
        let mut expert = vec![rows(F); 1 + usize::from(l.gated)];
        expert.push(rows(D));
        Factoring::new(vec![expert; 2])
    };
    for (layout, tiny) in checkpoints::all() {
        let (root, dir) = written(&tiny);
        let source = Checkpoint::open(&dir).unwrap();
        let factored = source.layers().iter().map(|l| (l.id, factoring(l))).collect();
        let plan = WritePlan { export: Export::Native, factored, ..plan_of(&source) };
        let plan = WritePlan { shard_bytes: 700, ..plan };
        let target = root.path().join("target");
        let own = !["fused", "granite", "gpt_oss", "llama4", "dbrx"].contains(&layout);
        let mut writer = Writer::create(&source, &target, &plan).unwrap();
        for id in plan.groupings.keys() {
            let merged = keep_dominants(&source, &plan, *id);
            let factors = Some(merged.experts.iter().map(all_rows).collect());
            writer.layer(&MergedLayer { factors, ..merged }).unwrap();
        }
        let summary = writer.finish(&Value::Null).unwrap();
        let native = Checkpoint::open(&target).unwrap();
        let has = native.tensors().any(|(name, ..)| name.ends_with(".weight.row_index"));
        assert_eq!(has, own, "{layout}");
        assert_eq!(summary.bytes, native.total_bytes());
        assert_eq!(summary.parameters, native.total_parameters());
        for info in native.layers() {
            let expected = keep_dominants(&source, &plan, info.id).experts;
            assert_eq!(native.read_merged(info.id).unwrap().experts, expected, "{layout}");
            assert_eq!((info.d_model, info.d_ff), (D, F));
        }
        let bare = keep_dominants(&source, &plan, source.layers()[0].id);
        let mut writer = Writer::create(&source, &root.path().join("bare"), &plan).unwrap();
        let found = writer.layer(&bare);
        assert_eq!(found.is_err(), own, "{layout}");
        if let Err(error) = found {
            assert!(error.to_string().contains("factors of every projection"), "{error}");
        }
    }
}

#[test]
fn expanded_folders_repeat_each_group() {
    for (_, tiny) in checkpoints::all() {
        let (root, dir) = written(&tiny);
        let target = root.path().join("target");
        export(&dir, &target, |s| WritePlan::new(Export::Expanded, groupings(s, &pairs())));
        let (source, big) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&target).unwrap());
        assert_eq!(big.total_bytes(), source.total_bytes());
        for info in big.layers() {
            for (i, dominant) in [2, 1, 2, 1].into_iter().enumerate() {
                let expected = source.read_expert(info.id, dominant).unwrap();
                assert_eq!(big.read_expert(info.id, i).unwrap(), expected);
            }
        }
    }
}

#[test]
fn experts_of_a_smaller_size_are_written_where_a_runtime_can_know_it() {
    let width = |key: &str| format!("\n  \"{key}\": {F},\n  \"odd\"");
    for (layout, mut tiny) in checkpoints::all() {
        tiny.config = tiny.config.replace("\n  \"odd\"", &width("intermediate_size"));
        let (root, dir) = written(&tiny);
        let source = Checkpoint::open(&dir).unwrap();
        let plan = WritePlan { d_ff: Some(F - 1), ..plan_of(&source) };
        let plan = WritePlan { export: Export::Native, ..plan };
        let target = root.path().join("target");
        if !source.can_hold_factors() {
            let error = Writer::create(&source, &target, &plan).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{layout}: {error}");
            continue;
        }
        let mut writer = Writer::create(&source, &target, &plan).unwrap();
        for layer in source.layers() {
            let mut merged = keep_dominants(&source, &plan, layer.id);
            let kept: Vec<u32> = (0..F as u32 - 1).collect();
            let small =
                |e: &mcsmoe::model::Expert| mcsmoe::decompose::reduced(&e.view(), &kept).unwrap();
            merged.experts = merged.experts.iter().map(small).collect();
            writer.layer(&merged).unwrap();
        }
        writer.finish(&Value::Null).unwrap();
        let small = Checkpoint::open(&target).unwrap();
        assert!(small.layers().iter().all(|l| l.d_ff == F - 1), "{layout}");
        assert_eq!(small.config().integer("intermediate_size").unwrap(), Some(F - 1));
    }
}

#[test]
fn a_size_that_is_not_the_experts_alone_is_refused() {
    let refusal = |change: &dyn Fn(&mut Tiny)| {
        let mut tiny = checkpoints::qwen();
        change(&mut tiny);
        let (root, dir) = written(&tiny);
        let source = Checkpoint::open(&dir).unwrap();
        let plan = WritePlan { d_ff: Some(F - 1), ..plan_of(&source) };
        let created = Writer::create(&source, &root.path().join("target"), &plan);
        created.err().map(|error| error.to_string())
    };
    let set = |t: &mut Tiny, line: String| {
        t.config = t.config.replace("\n  \"odd\"", &format!("\n  {line},\n  \"odd\""));
    };
    let moe = format!("\"moe_intermediate_size\": {F}");
    assert_eq!(refusal(&|t| set(t, moe.clone())), None);
    for key in ["n_shared_experts", "moe_num_shared_experts"] {
        let shared = refusal(&|t| set(t, format!("{moe},\n  \"{key}\": 1"))).unwrap();
        assert!(shared.contains("of other layers too"), "{shared}");
    }
    let dense = refusal(&|t| {
        t.config = t.config.replace("num_hidden_layers\": 2", "num_hidden_layers\": 3");
        t.add("model.layers.2.mlp.up_proj.weight", Dtype::F16, &[F, D]);
        set(t, format!("\"intermediate_size\": {F}"));
    });
    assert!(dense.unwrap().contains("of other layers too"));
    assert!(refusal(&|_| {}).unwrap().contains("moe_intermediate_size"));
    let mut tiny = checkpoints::qwen();
    set(&mut tiny, moe);
    let (root, dir) = written(&tiny);
    let source = Checkpoint::open(&dir).unwrap();
    for bad in [0, F + 1] {
        let plan = WritePlan { d_ff: Some(bad), ..plan_of(&source) };
        let error = Writer::create(&source, &root.path().join("target"), &plan).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
    }
}

#[test]
fn layers_in_any_order_give_the_same_files() {
    let tiny = checkpoints::deepseek();
    let (root, dir) = written(&tiny);
    let source = Checkpoint::open(&dir).unwrap();
    let plan = WritePlan { shard_bytes: 600, flatten_groups: true, ..plan_of(&source) };
    let write = |target: &Path, order: &[usize]| {
        let mut writer = Writer::create(&source, target, &plan).unwrap();
        for &i in order {
            writer.layer(&keep_dominants(&source, &plan, source.layers()[i].id)).unwrap();
        }
        let summary = writer.finish(&Value::Null).unwrap();
        assert_eq!(summary.dropped.len(), source.mtp_tensors().count());
        fs::read(target.join("mcsmoe.json")).unwrap()
    };
    let forward = write(&root.path().join("a"), &[0, 1]);
    assert_eq!(write(&root.path().join("b"), &[1, 0]), forward);
    let manifest: Value = serde_json::from_slice(&forward).unwrap();
    let files = manifest["files"].as_object().unwrap();
    assert!(files.len() > 4);
    for (name, file) in files {
        use sha2::{Digest, Sha256};
        let bytes = fs::read(root.path().join("a").join(name)).unwrap();
        let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            (file["sha256"].as_str(), file["bytes"].as_u64()),
            (Some(&*hash), Some(bytes.len() as u64)),
            "{name}"
        );
    }
}

/// Opens a changed Mixtral.
fn opened(change: impl FnOnce(&mut Tiny)) -> Error {
    let mut tiny = checkpoints::mixtral();
    change(&mut tiny);
    let (_root, dir) = written(&tiny);
    Checkpoint::open(&dir).unwrap_err()
}

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.2.w1.weight";

#[test]
fn layers_that_do_not_fit_are_refused_with_their_place() {
    let missing = opened(|t| {
        t.tensors.retain(|name, _| !name.contains("layers.1") || !name.contains("experts.2."))
    });
    assert!(matches!(missing.kind(), ErrorKind::Format { .. }), "{missing}");
    assert_eq!(
        (missing.place().layer.as_deref(), missing.place().expert),
        (Some("layers.1"), Some(2))
    );
    let far = opened(|t| {
        let name = format!("model.layers.0.block_sparse_moe.experts.{}.w1.weight", usize::MAX);
        t.add(name, Dtype::BF16, &[F, D]);
    });
    assert_eq!(far.place().expert, Some(N), "{far}");
    let last = opened(|t| t.tensors.retain(|name, _| !name.contains("experts.3.")));
    assert!(matches!(last.kind(), ErrorKind::Shape { .. }), "{last}");
    let projection = opened(|t| drop(t.tensors.remove(EXPERT)));
    assert!(projection.to_string().contains("no gate projection"), "{projection}");
    let ragged = opened(|t| t.add(EXPERT, Dtype::BF16, &[F + 1, D]));
    assert!(matches!(ragged.kind(), ErrorKind::Shape { .. }));
    assert_eq!((ragged.place().expert, ragged.place().tensor.as_deref()), (Some(2), Some(EXPERT)));
    let router = "model.layers.0.block_sparse_moe.gate.weight";
    let narrow = opened(|t| t.add(router, Dtype::BF16, &[N - 1, D]));
    assert!(matches!(narrow.kind(), ErrorKind::Shape { .. }), "{narrow}");
    let gone = opened(|t| drop(t.tensors.remove(router)));
    assert!(gone.to_string().contains("no router"), "{gone}");
    let orphan =
        opened(|t| t.tensors.retain(|name, _| !name.contains("layers.0.block_sparse_moe.e")));
    assert!(orphan.to_string().contains("router without experts"), "{orphan}");
    let count = opened(|t| t.config = t.config.replace("experts\": 4", "experts\": 8"));
    assert!(matches!(count.kind(), ErrorKind::Config { .. }), "{count}");
}

#[test]
fn unknown_layouts_and_types_are_named() {
    for name in [
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.ffn.experts.expert_0.fc3.weight",
    ] {
        let error = opened(|t| t.add(name, Dtype::F32, &[2]));
        assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
        assert_eq!(error.place().tensor.as_deref(), Some(name));
    }
    let dense = opened(|t| t.tensors.retain(|name, _| !name.contains("moe")));
    assert!(matches!(dense.kind(), ErrorKind::Unsupported { .. }));
    let whole = opened(|t| {
        let raw = Raw(Dtype::I16, vec![F, D], vec![0; 2 * F * D]);
        t.tensors.insert(EXPERT.into(), raw);
    });
    assert!(matches!(whole.kind(), ErrorKind::Unsupported { .. }), "{whole}");
}

#[test]
fn values_that_are_not_finite_are_refused_when_read() {
    let mut tiny = checkpoints::mixtral();
    tiny.tensors.get_mut(EXPERT).unwrap().2[6..8].copy_from_slice(&[0xc0, 0x7f]);
    let (_root, dir) = written(&tiny);
    let error = Checkpoint::open(&dir).unwrap().read_layer(LayerId::causal(1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFinite { index: 3, .. }), "{error}");
    let place = error.place();
    assert_eq!((place.expert, place.layer.as_deref()), (Some(2), Some("layers.1")));
    assert_eq!(place.tensor.as_deref(), Some(EXPERT));
    assert_eq!(place.file.as_deref(), Some(&*dir.join("model.safetensors")));
}

/// Opens a sharded Mixtral whose folder was tampered with.
fn tampered(change: impl FnOnce(&Path)) -> Error {
    let root = tempfile::tempdir().unwrap();
    checkpoints::mixtral().write_sharded(root.path(), 2);
    change(root.path());
    Checkpoint::open(root.path()).unwrap_err()
}

const SECOND: &str = "model-00002-of-00002.safetensors";

fn edit_index(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = dir.join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(index["weight_map"].as_object_mut().unwrap());
    fs::write(path, index.to_string()).unwrap();
}

#[test]
fn damaged_folders_are_refused_with_their_file() {
    let cut = tampered(|dir| {
        let bytes = fs::read(dir.join(SECOND)).unwrap();
        fs::write(dir.join(SECOND), &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(matches!(cut.kind(), ErrorKind::Format { .. }), "{cut}");
    assert!(cut.place().file.as_ref().unwrap().ends_with(SECOND));
    let empty = tampered(|dir| fs::write(dir.join(SECOND), []).unwrap());
    assert!(matches!(empty.kind(), ErrorKind::Format { .. }), "{empty}");
    let gone = tampered(|dir| fs::remove_file(dir.join(SECOND)).unwrap());
    assert!(matches!(gone.kind(), ErrorKind::Format { .. }), "{gone}");
    assert!(
        gone.to_string()
            .contains(&format!("1 of its 2 files are missing; download them: {SECOND}"))
    );
    for path in ["/etc/passwd", "../x.safetensors", "sub/x.safetensors"] {
        let escape = tampered(|dir| edit_index(dir, |map| map[EXPERT] = path.into()));
        assert!(matches!(escape.kind(), ErrorKind::Format { .. }), "{escape}");
        assert_eq!(escape.place().tensor.as_deref(), Some(EXPERT));
    }
    let lacking = tampered(|dir| {
        edit_index(dir, |map| drop(map.insert("ghost".into(), SECOND.into())));
    });
    assert!(matches!(lacking.kind(), ErrorKind::Format { .. }), "{lacking}");
    assert_eq!(lacking.place().tensor.as_deref(), Some("ghost"));
    let stray = tampered(|dir| edit_index(dir, |map| drop(map.remove(EXPERT))));
    assert_eq!(stray.place().tensor.as_deref(), Some(EXPERT), "{stray}");
    let twice = tampered(|dir| {
        fs::copy(dir.join(SECOND), dir.join("model-00001-of-00002.safetensors")).unwrap();
    });
    assert!(matches!(twice.kind(), ErrorKind::Format { .. }), "{twice}");
    let nothing = tampered(|dir| {
        fs::remove_file(dir.join("model.safetensors.index.json")).unwrap();
    });
    assert!(nothing.to_string().contains("2 other safetensors files"), "{nothing}");
}

#[cfg(unix)]
#[test]
fn linked_shards_of_a_hub_cache_are_read() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("snapshot");
    checkpoints::mixtral().write_sharded(&dir, 2);
    fs::rename(dir.join(SECOND), root.path().join("blob")).unwrap();
    std::os::unix::fs::symlink("../blob", dir.join(SECOND)).unwrap();
    assert_eq!(Checkpoint::open(&dir).unwrap().layers().len(), 2);
}

/// Starts an export of a Mixtral with a changed plan.
fn refused(tiny: &Tiny, change: impl FnOnce(&mut WritePlan)) -> Error {
    let (root, dir) = written(tiny);
    let source = Checkpoint::open(&dir).unwrap();
    let mut plan = plan_of(&source);
    change(&mut plan);
    let error = Writer::create(&source, &root.path().join("target"), &plan).unwrap_err();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "left something behind");
    error
}

#[test]
fn plans_that_no_runtime_could_load_are_refused_before_any_work() {
    let first = LayerId::causal(0);
    let one = Grouping::new(vec![Some(0); N], vec![0]).unwrap();
    let mixtral = checkpoints::mixtral();
    let uneven = refused(&mixtral, |p| drop(p.groupings.insert(first, Grouping::identity(N))));
    assert!(matches!(uneven.kind(), ErrorKind::Budget { .. }), "{uneven}");
    let absent = refused(&mixtral, |p| drop(p.groupings.remove(&first)));
    assert!(matches!(absent.kind(), ErrorKind::Budget { .. }), "{absent}");
    let few = refused(&mixtral, |p| p.groupings.values_mut().for_each(|g| *g = one.clone()));
    assert!(matches!(few.kind(), ErrorKind::OutOfRange { .. }), "{few}");
    let size = refused(&mixtral, |p| drop(p.groupings.insert(first, Grouping::identity(N + 1))));
    assert!(matches!(size.kind(), ErrorKind::Shape { .. }), "{size}");
    let unknown = refused(&mixtral, |p| {
        p.groupings.insert(LayerId::causal(9), pairs());
    });
    assert!(matches!(unknown.kind(), ErrorKind::OutOfRange { .. }), "{unknown}");
    // Two experts in two groups: one each, where the best two are summed.
    let groups = refused(&checkpoints::deepseek(), |_| {});
    assert!(groups.to_string().contains("routing group"), "{groups}");
    let dropping = Grouping::new(vec![Some(0), None, Some(1), None], vec![0, 2]).unwrap();
    let expanded = refused(&mixtral, |p| {
        p.export = Export::Expanded;
        p.groupings.insert(first, dropping);
    });
    assert!(matches!(expanded.kind(), ErrorKind::Unsupported { .. }), "{expanded}");
    let raised = refused(&mixtral, |p| p.top_k = Some(3));
    assert!(matches!(raised.kind(), ErrorKind::OutOfRange { .. }), "{raised}");
}

#[test]
fn targets_that_hold_anything_are_left_alone() {
    let (root, dir) = written(&checkpoints::mixtral());
    let source = Checkpoint::open(&dir).unwrap();
    let create = |target: &Path| Writer::create(&source, target, &plan_of(&source)).map(drop);
    let kind = |result: Result<()>| format!("{:?}", result.unwrap_err().kind());
    assert!(kind(create(&dir)).starts_with("Target"));
    assert!(kind(create(&dir.join("inside"))).starts_with("Target"));
    let full = root.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("precious"), "x").unwrap();
    assert!(kind(create(&full)).contains("not empty"));
    assert!(kind(create(&full.join("precious"))).contains("not a folder"));
    assert!(kind(create(&root.path().join("no/such/parent"))).starts_with("Io"));
    let target = root.path().join("target");
    fs::create_dir(root.path().join("target.partial")).unwrap();
    assert!(kind(create(&target)).contains("delete it"));
    fs::remove_dir(root.path().join("target.partial")).unwrap();
    #[cfg(unix)]
    {
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(kind(create(&link)).contains("it is the source"));
        assert!(kind(create(&link.join("inside"))).contains("inside the source"));
    }
    fs::create_dir(&target).unwrap();
    export(&dir, &target, plan_of);
    assert!(target.join("config.json").exists());
}

#[test]
fn a_run_that_does_not_finish_leaves_nothing() {
    let tiny = checkpoints::mixtral();
    let (root, dir) = written(&tiny);
    let source = Checkpoint::open(&dir).unwrap();
    let plan = plan_of(&source);
    let target = root.path().join("target");
    let [first, second] = [0, 1].map(|i| keep_dominants(&source, &plan, LayerId::causal(i)));
    let mut writer = Writer::create(&source, &target, &plan).unwrap();
    writer.layer(&second).unwrap();
    let again = writer.layer(&second).unwrap_err();
    assert!(matches!(again.kind(), ErrorKind::OutOfRange { .. }), "{again}");
    let bare = MergedLayer { narrowed: None, ..first.clone() };
    assert!(matches!(writer.layer(&bare).unwrap_err().kind(), ErrorKind::Missing { .. }));
    let other = MergedLayer { grouping: Grouping::identity(N), ..first };
    assert!(matches!(writer.layer(&other).unwrap_err().kind(), ErrorKind::Shape { .. }));
    assert!(root.path().join("target.partial").exists() && !target.exists());
    let unfinished = writer.finish(&Value::Null).unwrap_err();
    assert_eq!(unfinished.place().layer.as_deref(), Some("layers.0"));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    assert_eq!(checkpoints::load(&dir), tiny.tensors);
}

#[test]
fn a_weight_that_its_type_cannot_hold_spoils_the_run() {
    let (root, dir) = written(&checkpoints::qwen());
    let source = Checkpoint::open(&dir).unwrap();
    let plan = WritePlan { export: Export::Native, ..plan_of(&source) };
    let layers = [0, 1].map(|i| keep_dominants(&source, &plan, LayerId::causal(i)));
    let mut large = layers[0].clone();
    let (gate, mut up, down) = large.experts[1].clone().into_parts();
    up.weight[[0, 0]] = 1e6;
    large.experts[1] =
        mcsmoe::model::Expert::swiglu(gate.unwrap().weight, up.weight, down.weight).unwrap();
    let mut writer = Writer::create(&source, &root.path().join("target"), &plan).unwrap();
    let error = writer.layer(&large).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
    let tensor = "model.layers.0.mlp.experts.1.up_proj.weight";
    assert_eq!(error.place().tensor.as_deref(), Some(tensor));
    assert!(writer.layer(&layers[0]).is_err());
    writer.layer(&layers[1]).unwrap();
    assert!(writer.finish(&Value::Null).is_err());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}
