//! Times a truncated SVD of a matrix of raw little-endian `f32`, row by row: the least time and the
//! residual (`tools/bench_svd.py`).

use std::time::Instant;

use mcsmoe::linalg::{Cpu, PureRust, Randomized, SvdMethod, truncated_svd};
use ndarray::Array2;

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let [path, m, n, rank, method, repeats] = args else { return Err(USAGE.into()) };
    let bytes = std::fs::read(path)?;
    let value = |b: &[u8; 4]| f32::from_le_bytes(*b);
    let (values, _) = bytes.as_chunks::<4>();
    let a = Array2::from_shape_vec((m.parse()?, n.parse()?), values.iter().map(value).collect())?;
    drop(bytes);
    let rank: usize = rank.parse()?;
    let method = match method.as_str() {
        "full" => SvdMethod::Full,
        "gram" => SvdMethod::Gram,
        "randomized" => SvdMethod::Randomized(Randomized::default()),
        other => return Err(format!("unknown method {other}").into()),
    };
    let (mut best, mut residual) = (f64::INFINITY, 0.0);
    for _ in 0..repeats.parse::<usize>()? {
        let start = Instant::now();
        let svd = truncated_svd(a.view(), rank, method, 0, &Cpu::new(), &PureRust)?;
        best = best.min(start.elapsed().as_secs_f64());
        let error = &a - &svd.product(&Cpu::new())?;
        residual = error.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>().sqrt();
    }
    println!("{}", serde_json::json!({ "seconds": best, "residual": residual }));
    Ok(())
}
