//! Text that a model writes itself: what is sampled side by side is what the model believes.
use std::path::{Path, PathBuf};

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::{Model, SampleOptions};
use mcsmoe::stage::Context;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn options(vocab: usize) -> SampleOptions {
    let allowed = vec![true; vocab];
    SampleOptions {
        length: 12,
        temperature: 1.0,
        allowed,
        seed: 7,
        first_stream: 0,
        held_layers: 0,
    }
}

/// Runs `test` on every decoder-only checkpoint among the fixtures.
fn each(test: impl Fn(&str, &mcsmoe::forward::Causal<&Checkpoint>)) {
    let mut found = 0;
    for entry in std::fs::read_dir(fixtures().join("forward")).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(checkpoint) = Checkpoint::open(&folder) else { continue };
        let Ok(Model::Causal(model)) = Model::open_on(&checkpoint, Context::cpu(0)) else {
            continue;
        };
        test(&folder.display().to_string(), &model);
        found += 1;
    }
    assert!(found >= 15, "{found} checkpoints");
}

#[test]
fn without_temperature_it_is_the_greedy_continuation() {
    each(|name, model| {
        let prompts = vec![vec![3, 1, 4], vec![1, 5, 9], vec![2, 6, 5]];
        let cold = SampleOptions { temperature: 1e-6, ..options(model.vocab()) };
        let sampled = model.sample(&prompts, &cold).unwrap();
        for (prompt, sequence) in prompts.iter().zip(&sampled) {
            let greedy = model.generate(prompt, 9).unwrap();
            assert_eq!(sequence.len(), 12, "{name}");
            assert_eq!(sequence[..3], prompt[..], "{name}");
            // `generate` ends at the end token.
            assert_eq!(sequence[3..3 + greedy.len()], greedy[..], "{name}");
        }
    });
}

#[test]
fn held_layers_threads_and_company_do_not_change_a_sequence() {
    each(|name, model| {
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| vec![i + 1]).collect();
        let options = options(model.vocab());
        let sampled = model.sample(&prompts, &options).unwrap();
        let held = SampleOptions { held_layers: 9, ..options.clone() };
        assert_eq!(model.sample(&prompts, &held).unwrap(), sampled, "{name}");
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let alone = one.install(|| model.sample(&prompts, &options).unwrap());
        assert_eq!(alone, sampled, "{name}");
        let rest = SampleOptions { first_stream: 2, ..options.clone() };
        assert_eq!(model.sample(&prompts[2..], &rest).unwrap(), sampled[2..], "{name}");
        let other = SampleOptions { seed: 8, ..options.clone() };
        assert_ne!(model.sample(&prompts, &other).unwrap(), sampled, "{name}");
    });
}

#[test]
fn tokens_that_are_not_allowed_are_never_drawn() {
    let checkpoint = Checkpoint::open(fixtures().join("mixtral-8e")).unwrap();
    let Model::Causal(model) = Model::open_on(&checkpoint, Context::cpu(0)).unwrap() else {
        panic!("a decoder-only model");
    };
    let mut options = options(model.vocab());
    options.allowed.iter_mut().skip(10).for_each(|allowed| *allowed = false);
    for sequence in model.sample(&[vec![500], vec![600]], &options).unwrap() {
        assert!(sequence[1..].iter().all(|&token| token < 10), "{sequence:?}");
    }
    options.allowed.fill(false);
    assert!(model.sample(&[vec![500]], &options).is_err());
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let checkpoint = Checkpoint::open(fixtures().join("mixtral-8e")).unwrap();
    let Model::Causal(model) = Model::open_on(&checkpoint, Context::cpu(0)).unwrap() else {
        panic!("a decoder-only model");
    };
    let good = options(model.vocab());
    let refused = |prompts: &[Vec<u32>], options: &SampleOptions, word: &str| {
        let message = model.sample(prompts, options).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(&[vec![1], vec![1, 2]], &good, "tokens of a prompt");
    refused(&[vec![]], &good, "window");
    refused(&[vec![u32::MAX]], &good, "token id");
    refused(&[vec![1]], &SampleOptions { temperature: 0.0, ..good.clone() }, "temperature");
    refused(&[vec![1; 13]], &good, "length of a sequence");
    refused(&[vec![1]], &SampleOptions { length: 1 << 20, ..good.clone() }, "length of a sequence");
    refused(&[vec![1]], &SampleOptions { allowed: vec![true], ..good.clone() }, "flags");
    assert!(model.sample(&[], &good).unwrap().is_empty());
}
