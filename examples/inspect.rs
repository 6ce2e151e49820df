//! What is in a checkpoint: family, layout, and per MoE layer experts, shapes, type and bytes.
//!
//! ```text
//! cargo run --release --example inspect [-- MODEL]
//! ```

#![allow(clippy::print_stdout)] // It is a command.

use std::path::PathBuf;

use mcsmoe::checkpoint::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mixtral-8e");
    let model = std::env::args().nth(1).map_or(PathBuf::from(bundled), PathBuf::from);
    let checkpoint = Checkpoint::open(&model)?;
    let (parameters, bytes) = (checkpoint.total_parameters(), checkpoint.total_bytes());
    println!("{} ({}), layout {}", model.display(), checkpoint.family(), checkpoint.layout());
    println!("{parameters} parameters, {bytes} bytes");
    println!(
        "{:<18} {:>7} {:>5} {:>7} {:>6} {:>6} {:>12} {:>12}",
        "layer", "experts", "top-k", "d_model", "d_ff", "type", "parameters", "bytes"
    );
    for layer in checkpoint.layers() {
        println!(
            "{:<18} {:>7} {:>5} {:>7} {:>6} {:>6} {:>12} {:>12}",
            layer.id.to_string(),
            layer.experts,
            layer.rule.top_k,
            layer.d_model,
            layer.d_ff,
            layer.dtype,
            layer.expert_parameters,
            layer.expert_bytes,
        );
    }
    let experts: u64 = checkpoint.layers().iter().map(|l| l.expert_bytes).sum();
    println!("experts hold {:.1}% of all bytes", 100.0 * experts as f64 / bytes.max(1) as f64);
    assert!(!checkpoint.layers().is_empty(), "a checkpoint that opens has an MoE layer");
    Ok(())
}
