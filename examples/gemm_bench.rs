//! The timed half of `tools/bench_gemm.py`: gain products `A Bᵀ` on the CPU.
//!
//! ```text
//! cargo run --release --example gemm_bench -- M K N [REPEATS]
//! ```
//!
//! Prints one JSON line: the least seconds of `REPEATS` products of an `(M, K)` by a transposed
//! `(N, K)` matrix. `RAYON_NUM_THREADS` sets the number of threads.

#![allow(clippy::print_stdout)] // It is a command.

use std::time::Instant;

use mcsmoe::linalg::{Compute, Cpu};
use ndarray::Array2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let numbers: Vec<usize> =
        std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let [m, k, n, rest @ ..] = &numbers[..] else {
        return Err("usage: gemm_bench M K N [REPEATS]".into());
    };
    let value = |(i, j): (usize, usize)| ((i * 7919 + j * 104_729) % 1013) as f32 / 506.5 - 1.0;
    let (a, b) = (Array2::from_shape_fn((*m, *k), value), Array2::from_shape_fn((*n, *k), value));
    let mut out = Array2::zeros((*m, *n));
    let mut best = f64::INFINITY;
    for _ in 0..=rest.first().copied().unwrap_or(7) {
        let start = Instant::now();
        Cpu::new().gemm(1.0, a.view(), b.t(), 0.0, out.view_mut())?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{{\"seconds\": {best}, \"check\": {}}}", out[[0, 0]]);
    Ok(())
}
