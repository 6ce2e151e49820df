//! Perplexity of a checkpoint on text.

#![allow(clippy::print_stdout)] // It is a command.

use std::path::Path;

use mcsmoe::pipeline::{EvaluateOptions, evaluate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = Path::new("tests/fixtures/mixtral-8e");
    let text = Path::new("tests/fixtures/text/legal.txt,tests/fixtures/text/python.txt");
    let options = EvaluateOptions { max_windows: 8, ..EvaluateOptions::default() };
    let score = evaluate(model, text, &options)?.score;
    println!("perplexity {:.2} on {} tokens", score.perplexity, score.tokens);
    assert!(score.perplexity < 100.0, "trained: a uniform guess has 2048");
    Ok(())
}
