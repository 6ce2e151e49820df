//! Verification: what a run has written passes, and no damage does.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::fixture;
use mcsmoe::checkpoint::{Checkpoint, MANIFEST};
use mcsmoe::pipeline::{
    ExportChoice, Keep, Output, Recipe, Silent, TensorAction, Verdict, Verification, verify,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn merged(preset: &str, export: ExportChoice, shard_bytes: u64, target: &Path) {
    let recipe = Recipe::preset(preset, Keep::Experts(4)).unwrap().export(export);
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let stats = fixture("mixtral-8e.stats.safetensors");
    let output = Output { shard_bytes, ..Output::new(export) };
    let pipeline = recipe.builder().unwrap().build().unwrap();
    pipeline
        .run()
        .calibration(stats)
        .output(output)
        .observer(&Silent)
        .write(&source, target)
        .unwrap();
}

fn check(target: &Path) -> Verification {
    verify(target, Some(&fixture("mixtral-8e"))).unwrap()
}

/// A target in several files, two of whose groups are of one expert, that no stage has touched.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        merged("reap", ExportChoice::Stock, 1_200_000, &dir.path().join("whole"));
        Self { dir }
    }

    /// A copy, damaged by `damage`; with `forged` the manifest is made to fit the damage.
    fn damaged(&self, forged: bool, damage: &dyn Fn(&Path)) -> Verification {
        let target = self.dir.path().join("damaged");
        let _ = fs::remove_dir_all(&target);
        fs::create_dir(&target).unwrap();
        for entry in fs::read_dir(self.dir.path().join("whole")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, target.join(path.file_name().unwrap())).unwrap();
        }
        damage(&target);
        if forged {
            forge(&target);
        }
        check(&target)
    }
}

/// Writes sizes and hashes of what lies in the folder into its manifest.
fn forge(target: &Path) {
    let path = target.join(MANIFEST);
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let files = manifest["files"].as_object_mut().unwrap();
    for (name, recorded) in files.iter_mut() {
        let Ok(bytes) = fs::read(target.join(name)) else { continue };
        let hash = Sha256::digest(&bytes);
        let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        *recorded = json!({ "bytes": bytes.len(), "sha256": hash });
    }
    fs::write(path, manifest.to_string()).unwrap();
}

/// The first file of tensors whose header names one that `wanted` takes: its path, the header's
/// end, the tensor's name and its byte range in the file.
fn find(target: &Path, wanted: &str) -> (PathBuf, usize, String, std::ops::Range<usize>) {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(target).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.into_iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        let bytes = fs::read(&path).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
        for (name, entry) in header.as_object().unwrap() {
            if name.contains(wanted) {
                let at = |i: usize| end + entry["data_offsets"][i].as_u64().unwrap() as usize;
                return (path, end, name.clone(), at(0)..at(1));
            }
        }
    }
    panic!("no tensor {wanted}");
}

fn edit(target: &Path, wanted: &str, change: impl Fn(&mut [u8])) {
    let (path, _, _, range) = find(target, wanted);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes[range]);
    fs::write(path, bytes).unwrap();
}

/// Fails unless each of `names`, and nothing else, has a finding; `says` is in one of them.
fn failed(found: &Verification, names: &[&str], says: &str) {
    let failed: Vec<&str> = found
        .checks
        .iter()
        .filter(|check| check.verdict == Verdict::Failed)
        .map(|check| check.name.as_str())
        .collect();
    assert_eq!(failed, names, "{:#?}", found.checks);
    assert!(found.findings().any(|(_, finding)| finding.contains(says)), "{:#?}", found.checks);
    assert!(!found.is_clean());
}

#[test]
fn every_export_passes_and_every_tensor_is_accounted_for() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [
        ("fast", ExportChoice::Stock),
        ("m-smoe", ExportChoice::Native),
        ("hc-smoe", ExportChoice::Expanded),
        ("reap", ExportChoice::Stock),
    ];
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    for (preset, export) in kinds {
        let target = dir.path().join(preset);
        merged(preset, export, 1_000_000, &target);
        let found = check(&target);
        assert!(found.is_clean(), "{preset}: {:#?}", found.checks);
        assert_eq!(found.checks.len(), 7, "{preset}: {:#?}", found.checks);
        assert!(found.checks.iter().all(|c| c.verdict == Verdict::Passed), "{preset}");
        let names: Vec<&str> = source.tensors().map(|(name, ..)| name).collect();
        let told: Vec<&str> = found.tensors.iter().map(|t| &*t.tensor).collect();
        assert_eq!(told, names, "each tensor of the source once");
        assert_eq!(found.account[&TensorAction::Router], 4);
        use TensorAction::{Alone, Grouped, Pruned};
        let expert = |action| found.account.get(&action).copied().unwrap_or(0);
        assert_eq!(expert(Alone) + expert(Grouped) + expert(Pruned), 4 * 8 * 3);
        assert_eq!(preset == "reap", expert(Pruned) == 4 * 4 * 3);
        let alone = verify(&target, None).unwrap();
        assert!(alone.is_clean() && alone.tensors.is_empty());
    }
}

#[test]
fn a_flipped_bit_is_found() {
    let case = Case::new();
    let flip = |wanted: &'static str| {
        move |target: &Path| edit(target, wanted, |bytes| bytes[bytes.len() / 2] ^= 1)
    };
    for wanted in ["embed_tokens", "experts.2.w1", "layers.3.block_sparse_moe.gate"] {
        failed_first(&case.damaged(false, &flip(wanted)), "files");
    }
    // Even where the manifest was made to fit: copies and experts that stayed alone are compared.
    failed(&case.damaged(true, &flip("embed_tokens")), &["copies"], "embed_tokens");
    failed(&case.damaged(true, &flip("experts.2.w1")), &["copies"], "experts.2.w1");
}

fn failed_first(found: &Verification, name: &str) {
    let first = found.checks.iter().find(|check| check.verdict == Verdict::Failed);
    assert_eq!(first.map(|check| check.name.as_str()), Some(name), "{:#?}", found.checks);
}

/// Takes a tensor out of its file and the index.
fn drop_tensor(target: &Path, wanted: &str) {
    let (path, end, name, range) = find(target, wanted);
    let bytes = fs::read(&path).unwrap();
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let members = header.as_object_mut().unwrap();
    members.remove(&name);
    let gone = range.len() as u64;
    let start = (range.start - end) as u64;
    for (_, entry) in members.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        for offset in entry["data_offsets"].as_array_mut().unwrap() {
            let at = offset.as_u64().unwrap();
            if at > start {
                *offset = json!(at - gone);
            }
        }
    }
    let text = header.to_string();
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text.as_bytes());
    file.extend_from_slice(&bytes[end..range.start]);
    file.extend_from_slice(&bytes[range.end..]);
    fs::write(&path, file).unwrap();
    let index = target.join("model.safetensors.index.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    value["weight_map"].as_object_mut().unwrap().remove(&name);
    fs::write(index, value.to_string()).unwrap();
}

#[test]
fn a_dropped_tensor_is_found() {
    let case = Case::new();
    let drop_norm = |target: &Path| drop_tensor(target, "layers.1.input_layernorm");
    failed_first(&case.damaged(false, &drop_norm), "files");
    let found = case.damaged(true, &drop_norm);
    failed(&found, &["tensors", "forward"], "layers.1.input_layernorm.weight: missing");
    // An expert's projection: the folder cannot even be opened.
    let drop_down = |target: &Path| drop_tensor(target, "experts.3.w2");
    failed(&case.damaged(true, &drop_down), &["open"], "expert 3 has no down projection");
}

#[test]
fn a_changed_config_is_found() {
    let case = Case::new();
    let replace = |from: &'static str, to: &'static str| {
        move |target: &Path| {
            let path = target.join("config.json");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let theta = replace("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 2e-05");
    failed_first(&case.damaged(false, &theta), "files");
    failed(&case.damaged(true, &theta), &["config"], "as planned");
    let experts = replace("\"num_local_experts\": 4", "\"num_local_experts\": 8");
    failed(&case.damaged(true, &experts), &["open"], "number of experts");
}

#[test]
fn a_truncated_file_and_numbers_that_are_none_are_found() {
    let case = Case::new();
    let truncate = |target: &Path| {
        let (path, ..) = find(target, "layers.2.block_sparse_moe");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 2]).unwrap();
    };
    failed(&case.damaged(false, &truncate), &["files", "open"], "bytes were written");
    failed(&case.damaged(true, &truncate), &["open"], "offsets");
    // NaN in bf16, in a merged router, which no copy tells of.
    let nan = |target: &Path| {
        edit(target, "layers.1.block_sparse_moe.gate", |bytes| {
            bytes[6..8].copy_from_slice(&[0xc0, 0x7f]);
        });
    };
    failed_first(&case.damaged(false, &nan), "files");
    failed(&case.damaged(true, &nan), &["values", "forward"], "block_sparse_moe.gate");
}

#[test]
fn unlisted_missing_files_and_no_manifest_are_found() {
    let case = Case::new();
    let stray = |target: &Path| fs::write(target.join("modeling_x.py"), "import os").unwrap();
    failed(&case.damaged(true, &stray), &["files"], "modeling_x.py");
    let card = |target: &Path| fs::write(target.join("README.md"), "a card").unwrap();
    assert!(case.damaged(true, &card).is_clean(), "reports are for people");
    let gone = |target: &Path| fs::remove_file(target.join("tokenizer.json")).unwrap();
    // It is listed by the manifest, and it lies in the source.
    failed(&case.damaged(true, &gone), &["files", "config"], "tokenizer.json");
    let bare = |target: &Path| fs::remove_file(target.join(MANIFEST)).unwrap();
    failed(&case.damaged(false, &bare), &["files"], "read manifest");
    // The plan of another run.
    let plan = |target: &Path| {
        let path = target.join(MANIFEST);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text.replace("\"export\": \"stock\"", "\"export\": \"native\"")).unwrap();
    };
    assert!(!case.damaged(true, &plan).is_clean());
}
