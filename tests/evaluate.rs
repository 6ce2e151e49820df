//! Text through checkpoints on disk: perplexities equal those of the reference implementation.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::path::{Path, PathBuf};

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Causal;
use mcsmoe::model::{LayerId, TensorSource};
use mcsmoe::stage::Context;

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
        let folder = support::Folder::open(&fixtures().join("forward").join(name));
        let other = Causal::open(folder, Context::cpu(0)).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * i) % 64).collect();
        assert_eq!(model.logits(&tokens).unwrap(), other.logits(&tokens).unwrap(), "{name}");
    }
}
