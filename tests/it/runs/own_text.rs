//! Text of the model's own: the same at any memory and thread count, and of use to calibrate on.

use mcsmoe::ErrorKind;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{OwnTextOptions, Tokens, own_text};
use mcsmoe::stage::Context;

use crate::support::fixture;

fn written(options: &OwnTextOptions) -> Vec<Vec<u32>> {
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    match own_text(&source, options, &Context::cpu(0)).unwrap() {
        Tokens::Windows(windows) => windows,
        Tokens::Pairs(_) => panic!("windows"),
    }
}

fn small() -> OwnTextOptions {
    OwnTextOptions { tokens: 333, length: 16, ..OwnTextOptions::default() }
}

#[test]
fn sequences_are_whole_and_begin_with_different_plain_tokens() {
    let windows = written(&small());
    assert_eq!(windows.len(), 20);
    assert!(windows.iter().all(|window| window.len() == 16));
    let mut first: Vec<u32> = windows.iter().map(|window| window[0]).collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), 20);
    // The fixture's tokenizer has special tokens 0, 1 and 2.
    let special = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let end = special.config().integer("eos_token_id").unwrap().unwrap() as u32;
    assert!(windows.iter().flatten().all(|&id| id != end));
}

#[test]
fn memory_and_threads_do_not_change_a_token() {
    let whole = written(&small());
    // Room for no layer and a sequence at a time.
    assert_eq!(written(&OwnTextOptions { memory: 1, ..small() }), whole);
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(one.install(|| written(&small())), whole);
    assert_ne!(written(&OwnTextOptions { seed: 8, ..small() }), whole);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let refused = |options: &OwnTextOptions, word: &str| {
        let error = own_text(&source, options, &Context::cpu(0)).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(&OwnTextOptions { tokens: 15, ..small() }, "tokens of own text");
    refused(&OwnTextOptions { length: 1, ..small() }, "tokens of own text");
    refused(&OwnTextOptions { length: 1 << 20, tokens: 1 << 21, ..small() }, "length");
    refused(&OwnTextOptions { temperature: -1.0, ..small() }, "temperature");
    let switch = Checkpoint::open(fixture("forward/switch")).unwrap();
    let error = own_text(&switch, &small(), &Context::cpu(0)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
}
