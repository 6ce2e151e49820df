//! Times gain products `A Bᵀ` on the CPU: the least seconds of `REPEATS` products of an `(M, K)` by
//! a transposed `(N, K)` matrix (`tools/bench_gemm.py`). `RAYON_NUM_THREADS` sets the threads.

use std::time::Instant;

use mcsmoe::linalg::{Compute, Cpu};
use ndarray::Array2;

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let numbers: Vec<usize> = args.iter().map(|a| a.parse()).collect::<Result<_, _>>()?;
    let [m, k, n, rest @ ..] = &numbers[..] else { return Err(USAGE.into()) };
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
