//! What needs a tokenizer.

use std::path::Path;

use crate::support::evaluation_texts;
use mcsmoe::ErrorKind;
use mcsmoe::calibrate::text::{Limits, Select, Text, TextOptions};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{
    Calibration, Evaluation, ExportChoice, Keep, Recipe, RepetitionOptions, Task, Tokens, compare,
    evaluate, merge_then_compress, repetition,
};
use serde_json::Value;

use super::{TOLERANCE, bundled, copied, fixtures, golden, options, write_ids};

#[test]
fn perplexity_on_text_is_that_of_the_reference() {
    let golden = &golden()["causal"];
    let size = |key: &str| golden[key].as_u64().unwrap() as usize;
    let options = options(size("window"), size("max_windows"));
    let found = evaluate(&bundled(), &evaluation_texts(), &options).unwrap();
    assert_eq!((found.files.len(), found.task), (2, Task::CausalLm));
    let mut sum = 0.0;
    for file in &found.files {
        let expected = &golden["files"][&file.name];
        assert_eq!(file.score.tokens, expected["tokens"].as_u64().unwrap());
        let nll = expected["nll"].as_f64().unwrap();
        assert!((file.score.nll - nll).abs() < TOLERANCE, "{}: {nll} {file:?}", file.name);
        sum += nll * file.score.tokens as f64;
    }
    let nll = sum / found.score.tokens as f64;
    assert!((found.score.perplexity / nll.exp() - 1.0).abs() < TOLERANCE);
    assert_eq!(found.text.windows, 6);
    assert_eq!(found.text.tokens, 6 * 256);
    assert_eq!(found.text.files[0].sha256.len(), 64);
    let read: Evaluation = serde_json::from_str(&found.to_json().unwrap()).unwrap();
    assert_eq!(read.files, found.files);
}

#[test]
fn native_and_expanded_folders_of_a_merge_are_one_model() {
    let (target, text) = (tempfile::tempdir().unwrap(), evaluation_texts());
    let stats = fixtures().join("mixtral-8e.stats.safetensors");
    let mut scores = Vec::new();
    for (name, export) in [
        ("native", ExportChoice::Native),
        ("expanded", ExportChoice::Expanded),
        ("stock", ExportChoice::Stock),
    ] {
        let recipe = Recipe::preset("reap", Keep::Experts(6)).unwrap();
        let recipe = if export == ExportChoice::Stock {
            recipe
        } else {
            Recipe::preset("m-smoe", Keep::Experts(6)).unwrap()
        };
        let folder = target.path().join(name);
        merge_then_compress(bundled(), &stats, &folder, &recipe.export(export)).unwrap();
        let found = compare(&bundled(), &folder, &text, &options(128, 4)).unwrap();
        let alone = evaluate(&folder, &text, &options(128, 4)).unwrap();
        let (a, b) = (alone.score.nll, found.other.score.nll);
        assert!((a - b).abs() < 1e-6, "{name}: {a} {b}");
        assert_eq!(alone.family, "mixtral");
        assert!(found.kl > 0.01 && found.agreement < 1.0 && found.layers.len() == 4, "{name}");
        // A global budget may leave a layer as it was.
        assert!(found.layers.iter().all(|l| (0.0..2.0).contains(&l.error)), "{found:?}");
        assert!(found.layers.iter().any(|l| l.error > 0.01), "{found:?}");
        assert!(found.other.score.nll > found.original.score.nll, "{name}");
        scores.push(alone.score.nll);
    }
    // The same experts; members of a group that fire together are added in another order.
    assert!((scores[0] - scores[1]).abs() < 1e-5, "{scores:?}");
    assert!((scores[0] - scores[2]).abs() > 1e-3, "{scores:?}");
}

#[test]
fn text_and_its_windows_are_one_calibration() {
    let (target, text) = (tempfile::tempdir().unwrap(), fixtures().join("text/calib"));
    let source = Checkpoint::open(bundled()).unwrap();
    let windows = Tokens::read(&source, &text, Some(128), 1024, 7).unwrap();
    let Tokens::Windows(all) = &windows else { panic!("{windows:?}") };
    assert!(all.len() == 8 && all.iter().all(|window| window.len() == 128));
    // The seed draws; 512 tokens are the usual window.
    assert_ne!(Tokens::read(&source, &text, Some(128), 1024, 8).unwrap(), windows);
    let Tokens::Windows(usual) = Tokens::read(&source, &text, None, 1024, 7).unwrap() else {
        panic!("a decoder reads windows")
    };
    assert_eq!(usual.iter().map(Vec::len).collect::<Vec<_>>(), [512, 512]);
    let longer = Tokens::read(&source, &text, Some(1025), 2048, 7).unwrap_err();
    assert!(matches!(longer.kind(), ErrorKind::OutOfRange { .. }), "{longer}");

    let recipe = Recipe::preset("reap", Keep::Experts(4)).unwrap();
    let given = [windows.into(), Calibration::text(&text, 128, 1024, 7)];
    let reports = given.into_iter().enumerate().map(|(i, calibration)| {
        let folder = target.path().join(i.to_string());
        merge_then_compress(bundled(), calibration, &folder, &recipe).unwrap()
    });
    let mut reports: Vec<_> = reports.collect();
    // Only text has files to name.
    let named = reports[1].calibration.take().unwrap().text.unwrap();
    let files: Vec<_> = named.files.iter().map(|f| (&*f.name, f.windows, f.sha256.len())).collect();
    assert_eq!(files, [("legal.txt", 4, 64), ("python.txt", 4, 64)]);
    assert_eq!(reports[0].calibration, None);
    assert_eq!((reports[0].tokens, &reports[0]), (1024, &reports[1]));
}

#[test]
fn a_model_agrees_with_itself_and_repeats_itself_as_it_does() {
    let text = fixtures().join("text/python.txt");
    let same = compare(&bundled(), &bundled(), &text, &options(64, 2)).unwrap();
    assert_eq!((same.kl, same.agreement), (0.0, 1.0));
    assert!(same.layers.iter().all(|l| l.error == 0.0) && same.layers.len() == 4);
    let asked =
        RepetitionOptions { prompts: 2, prompt: 8, new_tokens: 24, ..RepetitionOptions::default() };
    let found = repetition(&bundled(), &text, &asked).unwrap();
    assert_eq!((found.text.windows, found.ngrams), (2, 2 * 21));
    assert!((0.0..1.0).contains(&found.rate));
    assert_eq!(repetition(&bundled(), &text, &asked).unwrap(), found);
    let written = mcsmoe::pipeline::generate(&bundled(), "def main(", 8).unwrap();
    assert!(!written.is_empty());
}

#[test]
fn lines_and_ids_are_read_as_the_text_that_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixtures().join("text/legal.txt")).unwrap();
    let text: String = text.chars().take(6000).collect();
    std::fs::write(dir.path().join("a.txt"), &text).unwrap();
    let line = serde_json::json!({ "text": text, "source": 1 });
    std::fs::write(dir.path().join("b.jsonl"), format!("{line}\n\n")).unwrap();
    std::fs::write(dir.path().join("c.md"), "not read").unwrap();
    let limits = Limits { vocab: 2048, longest: 1024, usual: 512 };
    let cut = TextOptions::new(100);
    let read = |path: &Path, cut: &TextOptions| Text::read(path, &bundled(), limits, cut).unwrap();
    let both = read(dir.path(), &cut);
    assert_eq!(both.sources()[0].windows, both.sources()[1].windows);
    let ids: Vec<i64> = both.sources()[0].windows.concat().iter().map(|&t| i64::from(t)).collect();
    write_ids(&dir.path().join("d.safetensors"), vec![ids.len()], &ids);
    write_ids(&dir.path().join("e.safetensors"), vec![ids.len() / 100, 100], &ids);
    let all = read(dir.path(), &cut);
    assert_eq!(all.sources().iter().map(|f| &*f.name).collect::<String>(), "abde");
    assert!(all.sources().iter().all(|f| f.windows == all.sources()[0].windows));
    let drawn = read(dir.path(), &cut.select(Select::Tokens(750)).seed(7));
    assert_eq!((drawn.windows().count(), drawn.record().tokens), (7, 700));
    assert_eq!(drawn.record().options.seed, 7);
}

#[test]
fn hostile_text_is_refused_with_the_file() {
    let (dir, model) = (tempfile::tempdir().unwrap(), copied(&bundled()));
    let refused = |name: &str, bytes: &[u8], says: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = evaluate(model.path(), &path, &options(64, 1)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(error.place().file.as_deref(), Some(&*path));
    };
    refused("empty.txt", b"", "at least one window of 64 tokens, found 0 tokens");
    refused("short.txt", b"short", "at least one window of 64 tokens");
    refused("latin1.txt", b"caf\xe9", "invalid byte at offset 3");
    refused("bad.jsonl", b"{\"text\": \"a\"}\n{\"txt\": 1}", "line 2");
    refused("bad.safetensors", b"nonsense", "token ids (safetensors)");
    refused("a.docx", b"text", ".txt, .jsonl, .json");
    let missing = dir.path().join("missing.txt");
    let error = evaluate(model.path(), &missing, &options(64, 1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");

    let text = fixtures().join("text/python.txt");
    for window in [0, 1025] {
        let error = evaluate(model.path(), &text, &options(window, 1)).unwrap_err().to_string();
        assert!(error.contains("1 to 1024 tokens"), "{error}");
    }
    let tokenizer = model.path().join("tokenizer.json");
    let own = std::fs::read_to_string(&tokenizer).unwrap();
    let mut foreign: Value = serde_json::from_str(&own).unwrap();
    let token = serde_json::json!({"id": 2048, "content": "<new>", "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    foreign["added_tokens"].as_array_mut().unwrap().push(token);
    std::fs::write(&tokenizer, foreign.to_string()).unwrap();
    // An id that the model does not have harms only a text that uses it.
    evaluate(model.path(), &text, &options(64, 1)).unwrap();
    let used = dir.path().join("used.txt");
    std::fs::write(&used, std::fs::read_to_string(&text).unwrap() + "<new>" + &"more ".repeat(200))
        .unwrap();
    let error = evaluate(model.path(), &used, &options(64, 1)).unwrap_err();
    let says = "`<new>` in the text: expected below the model's vocabulary of 2048, found 2048";
    assert!(error.to_string().contains(says), "{error}");
    for (content, says) in [(Some("{}"), "malformed tokenizer.json"), (None, "AutoTokenizer")] {
        match content {
            Some(content) => std::fs::write(&tokenizer, content).unwrap(),
            None => std::fs::remove_file(&tokenizer).unwrap(),
        }
        let error = evaluate(model.path(), &text, &options(64, 1)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(error.place().file.as_deref(), Some(&*tokenizer));
    }
}
