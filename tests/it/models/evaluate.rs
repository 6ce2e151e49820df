//! Text through checkpoints on disk: perplexities equal those of the reference implementation.

#[cfg(feature = "text")]
mod text;

use std::path::{Path, PathBuf};

use crate::support::weights;
use mcsmoe::ErrorKind;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Causal;
use mcsmoe::model::{LayerId, TensorSource};
use mcsmoe::pipeline::{EvaluateOptions, RepetitionOptions, Task, compare, evaluate, repetition};
use mcsmoe::stage::Context;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[test]
fn a_checkpoint_is_a_source_of_weights() {
    let checkpoint = Checkpoint::open(fixtures().join("mixtral-8e")).unwrap();
    assert_eq!((checkpoint.prefix(), checkpoint.has("lm_head.weight")), ("model.", true));
    assert_eq!(checkpoint.shape("model.norm.weight").unwrap(), [128]);
    let embedding = checkpoint.matrix("model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.dim(), (2048, 128));
    TensorSource::release(&checkpoint, "model.");
    assert_eq!(checkpoint.matrix("model.embed_tokens.weight").unwrap(), embedding);
    assert!(checkpoint.is_moe(LayerId::causal(3)) && !checkpoint.is_moe(LayerId::causal(4)));
    let whole = TensorSource::moe(&checkpoint, LayerId::causal(1)).unwrap();
    assert_eq!(whole, checkpoint.read_merged(LayerId::causal(1)).unwrap());

    for name in ["model.norm.bias", "model.norm.weight"] {
        let error = checkpoint.matrix(name).unwrap_err();
        assert_eq!(error.place().tensor.as_deref(), Some(name));
        assert!(error.place().file.is_some(), "{error}");
    }
}

#[test]
fn a_checkpoint_runs_as_its_weights_in_memory_do() {
    for name in ["mixtral", "qwen2-moe", "deepseek-v3", "olmoe"] {
        let checkpoint = Checkpoint::open(fixtures().join("forward").join(name)).unwrap();
        let model = Causal::open(&checkpoint, Context::cpu(0)).unwrap();
        let folder = weights::Folder::open(&fixtures().join("forward").join(name));
        let other = Causal::open(folder, Context::cpu(0)).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * i) % 64).collect();
        assert_eq!(model.logits(&tokens).unwrap(), other.logits(&tokens).unwrap(), "{name}");
    }
}

fn bundled() -> PathBuf {
    fixtures().join("mixtral-8e")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("evaluate.json")).unwrap()).unwrap()
}

fn options(window: usize, max_windows: usize) -> EvaluateOptions {
    EvaluateOptions { window: Some(window), max_windows, ..EvaluateOptions::default() }
}

fn write_ids(path: &Path, shape: Vec<usize>, ids: &[i64]) {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::I64, shape, &bytes).unwrap();
    std::fs::write(path, safetensors::serialize([("ids", tensor)], None).unwrap()).unwrap();
}

/// A copy of the files of a folder.
fn copied(from: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// The reference computes in f32 too; both round differently by some 1e-6.
const TOLERANCE: f64 = 1e-5;

/// The Switch fixture with sentinels, and windows of token ids.
fn switch() -> (TempDir, PathBuf) {
    let dir = copied(&fixtures().join("forward/switch"));
    std::fs::remove_file(dir.path().join("golden.safetensors")).unwrap();
    let token = |i: usize| serde_json::json!({"id": 2 + i, "content": format!("<extra_id_{i}>")});
    let added: Vec<Value> = (0..16).map(token).collect();
    let tokenizer = serde_json::json!({ "added_tokens": added });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let ids: Vec<i64> = (0..256).map(|i| 20 + (7 * i * i + 3 * i) % 44).collect();
    let text = dir.path().join("text");
    std::fs::create_dir(&text).unwrap();
    write_ids(&text.join("ids.safetensors"), vec![4, 64], &ids);
    (dir, text)
}

#[test]
fn span_corruption_loss_is_that_of_the_reference() {
    let golden = &golden()["switch"];
    let (dir, text) = switch();
    let found = evaluate(dir.path(), &text, &options(64, 4)).unwrap();
    assert_eq!((found.task, found.score.tokens), (Task::SpanCorruption, 4 * 14));
    assert_eq!(found.score.tokens, golden["tokens"].as_u64().unwrap());
    let nll = golden["nll"].as_f64().unwrap();
    assert!((found.score.nll - nll).abs() < TOLERANCE, "{} {nll}", found.score.nll);

    let same = compare(dir.path(), dir.path(), &text, &options(64, 4)).unwrap();
    assert_eq!((same.kl, same.agreement, same.layers.len()), (0.0, 1.0, 3));
    assert!((same.other.score.nll - nll).abs() < TOLERANCE);
    let asked = RepetitionOptions { prompts: 2, prompt: 64, new_tokens: 6, ngram: 1, seed: 3 };
    let found = repetition(dir.path(), &text, &asked).unwrap();
    assert!(found.ngrams == found.tokens && found.tokens <= 12 && found.rate < 1.0);
}

#[test]
fn token_ids_need_no_tokenizer() {
    let (model, text) = (copied(&bundled()), tempfile::tempdir().unwrap());
    std::fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    let file = text.path().join("ids.safetensors");
    write_ids(&file, vec![64], &(0..64).collect::<Vec<_>>());
    let found = evaluate(model.path(), &file, &options(64, 1)).unwrap();
    assert_eq!((found.score.tokens, found.text.tokenizer_sha256), (63, None));

    write_ids(&file, vec![64], &(1990..2054).collect::<Vec<_>>());
    let error = evaluate(model.path(), &file, &options(64, 1)).unwrap_err();
    assert!(error.to_string().contains("below the model's vocabulary of 2048, found 2048"));
    assert_eq!(error.place().file.as_deref(), Some(&*file));
    write_ids(&file, vec![1, 64], &[1; 64]);
    let error = evaluate(model.path(), &file, &options(32, 1)).unwrap_err().to_string();
    assert!(error.contains("windows of at most 32 tokens, found 64"), "{error}");
}

#[cfg(not(feature = "text"))]
#[test]
fn text_needs_the_feature() {
    let error = evaluate(&bundled(), &fixtures().join("text"), &options(64, 1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }));
    assert!(error.to_string().contains("feature `text`"), "{error}");
}

/// The bundled model with the bytes of one tensor replaced by a repeated bf16.
fn filled(name: &str, with: u16) -> TempDir {
    let dir = copied(&bundled());
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let at = file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    let length = file.tensor(name).unwrap().data().len();
    let mut changed = bytes.clone();
    changed[at..at + length]
        .chunks_exact_mut(2)
        .for_each(|b| b.copy_from_slice(&with.to_le_bytes()));
    std::fs::write(&path, changed).unwrap();
    dir
}

#[test]
fn numbers_that_are_not_finite_name_their_layer() {
    let text = tempfile::tempdir().unwrap();
    write_ids(&text.path().join("ids.safetensors"), vec![40], &(0..40).collect::<Vec<_>>());
    let fails = |name: &str, with: u16| {
        let model = filled(name, with);
        let error = evaluate(model.path(), text.path(), &options(40, 1)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotFinite { .. }), "{error}");
        error
    };
    let name = "model.layers.2.self_attn.o_proj.weight";
    let error = fails(name, 0x7fc0);
    assert_eq!(error.place().tensor.as_deref(), Some(name));
    assert_eq!(error.place().layer.as_deref(), Some("layers.2"));
    // 1.7e38: finite, but no product of it is.
    let error = fails("model.layers.1.post_attention_layernorm.weight", 0x7f00);
    assert_eq!(error.place().layer.as_deref(), Some("layers.1"), "{error}");
    fails("lm_head.weight", 0x7f00);
}

#[test]
fn other_families_and_other_models_are_refused() {
    let text = tempfile::tempdir().unwrap();
    write_ids(&text.path().join("ids.safetensors"), vec![40], &(0..40).collect::<Vec<_>>());
    let model = copied(&bundled());
    let config = model.path().join("config.json");
    let own = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, own.replace("\"mixtral\"", "\"granitemoe\"")).unwrap();
    let error = evaluate(model.path(), text.path(), &options(40, 1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }));
    let says = error.to_string();
    assert!(says.contains("qwen3_moe") && says.contains("statistics"), "{says}");
    assert_eq!(error.place().file.as_deref(), Some(&*config));

    let other = fixtures().join("forward/olmoe");
    let error = compare(&bundled(), &other, text.path(), &options(40, 1)).unwrap_err();
    assert!(error.to_string().contains("vocabulary: expected shape 2048, found 64"), "{error}");
}
