//! This crate's side of the comparisons in `tools/`: one operation on given data, one line of JSON.
//!
//! ```text
//! cargo bench --bench peers -- OPERATION ARGUMENTS
//! ```

#![allow(missing_docs, clippy::print_stdout)] // It is a command.

mod assign;
mod gemm;
#[cfg(feature = "gpu")]
mod gpu;
mod logits;
mod routed;
mod svd;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: cargo bench --bench peers -- OPERATION ARGUMENTS
    assign FILE N [RELATIVE_GAP [REPEATS]]
    gemm M K N [REPEATS]
    gpu (adapters | gemm | gain | layer) SIZES [DEVICE] [REPEATS]    with --features gpu
    logits MODEL TOKENS.safetensors OUT.safetensors
    routed MODEL STATS.safetensors
    svd FILE M N RANK (full | gram | randomized) REPEATS";

fn main() -> Outcome {
    // `cargo bench` adds `--bench`; without an operation there is nothing to measure.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.split_first() {
        None => println!("{USAGE}"),
        Some((operation, rest)) => match operation.as_str() {
            "assign" => assign::run(rest)?,
            "gemm" => gemm::run(rest)?,
            #[cfg(feature = "gpu")]
            "gpu" => gpu::run(rest)?,
            "logits" => logits::run(rest)?,
            "routed" => routed::run(rest)?,
            "svd" => svd::run(rest)?,
            _ => return Err(USAGE.into()),
        },
    }
    Ok(())
}
