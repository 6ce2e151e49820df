//! Perplexity of a checkpoint on text, and how much it repeats itself; with a second checkpoint,
//! what the two differ in. Prints JSON.
//!
//! ```text
//! cargo run --release --example evaluate                          # bundled checkpoint and text
//! cargo run --release --example evaluate -- MODEL TEXT [OTHER]
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::{Path, PathBuf};

use mcsmoe::pipeline::{EvaluateOptions, LoopOptions, compare, evaluate, loops};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let options = EvaluateOptions::default();
    let found = match &args[..] {
        [] => {
            let (model, text) = (fixtures.join("mixtral-8e"), fixtures.join("text"));
            let found = evaluate(&model, &text, &EvaluateOptions { max_windows: 8, ..options })?;
            assert!(found.score.perplexity < 100.0, "trained: a uniform guess has 2048");
            let repeated = loops(&model, &text, &LoopOptions { prompts: 4, ..Default::default() })?;
            serde_json::json!({ "evaluation": found, "loops": repeated })
        }
        [model, text] => {
            let found = evaluate(model, text, &options)?;
            let repeated = loops(model, text, &LoopOptions::default())?;
            serde_json::json!({ "evaluation": found, "loops": repeated })
        }
        [model, text, other] => serde_json::to_value(compare(model, other, text, &options)?)?,
        _ => return Err("usage: evaluate [MODEL TEXT [OTHER]]".into()),
    };
    println!("{}", serde_json::to_string_pretty(&found)?);
    Ok(())
}
