//! From text to a smaller checkpoint: runs text through a trained Mixtral, merges it from 8 to 4
//! experts per layer by what its routers did, as a stock folder that any runtime loads and as a
//! native folder with the paper's semantics, and prints what was saved and what it cost.
//!
//! ```text
//! cargo run --release --example merge_then_compress       # the bundled checkpoint and text
//! cargo run --release --example merge_then_compress -- MODEL TEXT TARGET KEEP [PRESET]
//! cargo run --release --example merge_then_compress -- MODEL TEXT TARGET RECIPE.toml
//! ```
//!
//! TEXT is a `.txt` or `.jsonl` file, token ids in a safetensors file, or a folder of these; or a
//! statistics file. `--evaluate OTHER_TEXT` prints perplexities, before and after; `--tokens N`
//! bounds the calibration tokens.

#![allow(clippy::print_stdout)] // It is a command.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::Stack;
use mcsmoe::pipeline::{
    Calibration, Change, EvaluateOptions, ExportChoice, Keep, Recipe, Report, Tokens, evaluate,
    merge_then_compress,
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Most calibration tokens unless given; drawn by a fixed seed.
const TOKENS: usize = 16_384;
const USAGE: &str = "usage: merge_then_compress [MODEL (TEXT | STATS) TARGET \
    (KEEP [PRESET] | RECIPE) [--evaluate TEXT] [--tokens N]]";

fn main() -> Outcome {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let evaluation = option(&mut args, "--evaluate")?.map(PathBuf::from);
    let evaluation = evaluation.as_deref();
    let tokens = option(&mut args, "--tokens")?.map_or(Ok(TOKENS), |n| n.parse())?;
    let given =
        |model: &String, given: &String| calibration(model.as_ref(), given.as_ref(), tokens);
    match &args[..] {
        [] => bundled(),
        [model, text, target, recipe] if recipe.parse::<usize>().is_err() => {
            let runs = [(PathBuf::from(target), Recipe::read(Path::new(recipe))?)];
            run(model.as_ref(), &given(model, text)?, &runs, evaluation).map(drop)
        }
        [model, text, target, keep, rest @ ..] if rest.len() < 2 => {
            let preset = rest.first().map_or("m-smoe", String::as_str);
            let runs = both(target.as_ref(), keep.parse()?, preset)?;
            run(model.as_ref(), &given(model, text)?, &runs, evaluation).map(drop)
        }
        _ => Err(USAGE.into()),
    }
}

/// Takes an option and its value out of the arguments.
fn option(args: &mut Vec<String>, name: &str) -> Outcome<Option<String>> {
    let Some(at) = args.iter().position(|arg| arg == name) else { return Ok(None) };
    if at + 1 == args.len() {
        return Err(USAGE.into());
    }
    args.remove(at);
    Ok(Some(args.remove(at)))
}

/// The checkpoint and the text that come with the repository; earlier output of this example is
/// replaced. No piece of the text that is evaluated on is in the text that is calibrated on.
fn bundled() -> Outcome {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let target = std::env::temp_dir().join("mcsmoe-example");
    if target.exists() {
        std::fs::remove_dir_all(&target)?;
    }
    let (model, text) = (fixtures.join("mixtral-8e"), fixtures.join("text"));
    let given = calibration(&model, &text.join("calib"), TOKENS)?;
    let found = run(&model, &given, &both(&target, 4, "fast")?, Some(&text))?;
    let [original, merged @ ..] = &found[..] else { return Err("nothing was evaluated".into()) };
    assert!(merged.len() == 2 && merged.iter().all(|p| p > original && *p < 3.0 * original));
    Ok(())
}

/// A stock and a native folder in `target`; a native one alone where it is the factors that count.
fn both(target: &Path, keep: usize, preset: &str) -> Outcome<Vec<(PathBuf, Recipe)>> {
    std::fs::create_dir_all(target)?;
    let folders = [("stock", ExportChoice::Stock), ("native", ExportChoice::Native)];
    let run = |(name, export)| {
        let recipe = Recipe::preset(preset, Keep::Experts(keep))?.export(export);
        Ok((target.join(name), recipe))
    };
    let native_only = preset == "mc-smoe-budget";
    folders.into_iter().filter(|(name, _)| !native_only || *name == "native").map(run).collect()
}

/// Writes every folder, and returns the perplexities of the model and of each.
fn run(
    model: &Path,
    given: &Calibration,
    runs: &[(PathBuf, Recipe)],
    evaluation: Option<&Path>,
) -> Outcome<Vec<f64>> {
    let mut found = Vec::new();
    if let Some(text) = evaluation {
        found.push(perplexity(model, text, "the original")?);
    }
    for (folder, recipe) in runs {
        let start = Instant::now();
        print(&merge_then_compress(model, given.clone(), recipe, folder)?, folder);
        println!("{:.1} s", start.elapsed().as_secs_f64());
        if let Some(text) = evaluation {
            found.push(perplexity(folder, text, "merged")?);
        }
    }
    Ok(found)
}

/// A statistics file, or the tokens of a text, in windows drawn by a fixed seed.
fn calibration(model: &Path, given: &Path, most: usize) -> Outcome<Calibration> {
    if !is_text(given)? {
        return Ok(Calibration::Statistics(given.into()));
    }
    let tokens = Tokens::read(&Checkpoint::open(model)?, given, None, most, 7)?;
    let text = given.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(given).display();
    println!("calibration: {} tokens of {text}", tokens.of(Stack::Causal));
    Ok(tokens.into())
}

/// Whether a path is text or token ids; a statistics file holds many tensors, token ids are one.
fn is_text(path: &Path) -> Outcome<bool> {
    if path.is_dir() || path.extension().is_none_or(|ending| ending != "safetensors") {
        return Ok(true);
    }
    let bytes = std::fs::read(path)?;
    Ok(safetensors::SafeTensors::deserialize(&bytes)?.len() == 1)
}

fn perplexity(model: &Path, text: &Path, what: &str) -> Outcome<f64> {
    let score = evaluate(model, text, &EvaluateOptions::default())?.score;
    let (perplexity, nats, tokens) = (score.perplexity, score.nll, score.tokens);
    println!("perplexity, {what}: {perplexity:.2} ({nats:.3} nats per token, {tokens} tokens)");
    Ok(perplexity)
}

fn print(report: &Report, folder: &Path) {
    // "similarity router-logits" → "router-logits": the order says what is what.
    let name = |stage: &String| stage.split(' ').next_back().unwrap_or_default().to_owned();
    let stages: Vec<String> = report.stages.iter().map(name).collect();
    println!("\n{}\n{}", folder.display(), stages.join(" → "));
    println!("{:<12} {:>7}  {:>11}  groups", "layer", "experts", "output err.");
    for layer in &report.layers {
        let error = layer
            .output_error
            .map_or("-".into(), |e| format!("{:.1}%", 100.0 * e.narrowed.unwrap_or(e.mapped)));
        let groups: Vec<String> = layer.groups.iter().map(|g| format!("{:?}", g.members)).collect();
        let experts = format!("{}→{}", layer.experts.before, layer.experts.after);
        println!("{:<12} {experts:>7}  {error:>11}  {}", layer.layer, groups.join(" "));
    }
    let flops = report.flops_per_token;
    println!("MoE FLOPs per token: {} → {}", flops.before, flops.after);
    if let Some(written) = &report.written {
        let change = |what: &str, c: Change<u64>| {
            let saved = 100.0 * c.saved();
            println!("{what}: {} → {} ({saved:.1}% saved)", c.before, c.after);
        };
        change("parameters", written.parameters);
        change("expert bytes", written.expert_bytes);
        change("tensor bytes", written.tensor_bytes);
    }
}
