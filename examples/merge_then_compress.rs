//! Merges a trained Mixtral checkpoint from 8 to 4 experts per layer, as a stock folder that any
//! runtime loads and as a native folder with the paper's semantics, and prints what was saved.
//!
//! ```text
//! cargo run --release --example merge_then_compress                 # the bundled checkpoint
//! cargo run --release --example merge_then_compress -- MODEL STATS TARGET KEEP [PRESET]
//! cargo run --release --example merge_then_compress -- MODEL STATS TARGET RECIPE.toml
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::Path;

use mcsmoe::pipeline::{ExportChoice, Keep, Recipe, Report, merge_then_compress};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [] => bundled(),
        [model, stats, target, recipe] if recipe.parse::<usize>().is_err() => {
            let recipe = Recipe::read(Path::new(recipe))?;
            let report =
                merge_then_compress(Path::new(model), Path::new(stats), &recipe, target.as_ref())?;
            print(&report, Path::new(target));
            Ok(())
        }
        [model, stats, target, keep, rest @ ..] if rest.len() < 2 => {
            let preset = rest.first().map_or("m-smoe", String::as_str);
            both(Path::new(model), Path::new(stats), Path::new(target), keep.parse()?, preset)
        }
        _ => Err("usage: merge_then_compress [MODEL STATS TARGET (KEEP [PRESET] | RECIPE)]".into()),
    }
}

/// The checkpoint that comes with the repository; earlier output of this example is replaced.
fn bundled() -> Result<(), Box<dyn std::error::Error>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let target = std::env::temp_dir().join("mcsmoe-example");
    if target.exists() {
        std::fs::remove_dir_all(&target)?;
    }
    let (model, stats) =
        (fixtures.join("mixtral-8e"), fixtures.join("mixtral-8e.stats.safetensors"));
    both(&model, &stats, &target, 4, "m-smoe")
}

/// A stock and a native folder in `target`.
fn both(
    model: &Path,
    stats: &Path,
    target: &Path,
    keep: usize,
    preset: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    std::fs::create_dir_all(target)?;
    for (name, export) in [("stock", ExportChoice::Stock), ("native", ExportChoice::Native)] {
        let recipe = Recipe::preset(preset, Keep::Experts(keep))?.export(export);
        let folder = target.join(name);
        let report = merge_then_compress(model, stats, &recipe, &folder)?;
        print(&report, &folder);
    }
    Ok(())
}

fn print(report: &Report, folder: &Path) {
    println!("\n{} → {}", report.stages.join(", "), folder.display());
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
        let change = |what: &str, c: mcsmoe::pipeline::Change<u64>| {
            let saved = 100.0 * c.saved();
            println!("{what}: {} → {} ({saved:.1}% saved)", c.before, c.after);
        };
        change("parameters", written.parameters);
        change("expert bytes", written.expert_bytes);
        change("tensor bytes", written.tensor_bytes);
    }
}
