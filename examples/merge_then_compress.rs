//! Merges a trained Mixtral checkpoint from 8 to 4 experts per layer, as a stock folder that any
//! runtime loads and as a native folder with the paper's semantics, and prints what was saved.
//!
//! ```text
//! cargo run --release --example merge_then_compress                 # the bundled checkpoint
//! cargo run --release --example merge_then_compress -- MODEL STATS TARGET KEEP [PRESET]
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::{Path, PathBuf};

use mcsmoe::pipeline::{ExportChoice, Keep, Recipe, Report, merge_then_compress};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, stats, target, keep, preset) = match &args[..] {
        [] => bundled()?,
        [model, stats, target, keep, rest @ ..] => {
            let preset = rest.first().map_or("m-smoe", String::as_str).to_owned();
            (model.into(), stats.into(), PathBuf::from(target), keep.parse()?, preset)
        }
        _ => return Err("usage: merge_then_compress [MODEL STATS TARGET KEEP [PRESET]]".into()),
    };
    for export in [ExportChoice::Stock, ExportChoice::Native] {
        let recipe = Recipe::preset(&preset, Keep::Experts(keep))?.export(export);
        let name = if export == ExportChoice::Stock { "stock" } else { "native" };
        let folder = target.join(name);
        let report = merge_then_compress(&model, &stats, &recipe, &folder)?;
        print(&report, &preset, &folder);
    }
    Ok(())
}

type Arguments = (PathBuf, PathBuf, PathBuf, usize, String);

/// The checkpoint that comes with the repository; earlier output of this example is replaced.
fn bundled() -> std::io::Result<Arguments> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = root.join("tests/fixtures");
    let target = std::env::temp_dir().join("mcsmoe-example");
    if target.exists() {
        std::fs::remove_dir_all(&target)?;
    }
    std::fs::create_dir_all(&target)?;
    let stats = fixtures.join("mixtral-8e.stats.safetensors");
    Ok((fixtures.join("mixtral-8e"), stats, target, 4, "m-smoe".into()))
}

fn print(report: &Report, preset: &str, folder: &Path) {
    println!("\n{preset} → {}", folder.display());
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
