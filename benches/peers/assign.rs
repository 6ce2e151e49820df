//! Times the assignment solver on a square matrix of raw little-endian `f32`, row by row: the least
//! time of a solve, the objective and the certified gap (`tools/bench_assign.py`).

use std::time::Instant;

use mcsmoe::linalg::assign_within;
use ndarray::Array2;

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let [file, n, rest @ ..] = args else { return Err(USAGE.into()) };
    let relative_gap: f64 = rest.first().map_or(Ok(0.0), |x| x.parse())?;
    let repeats: usize = rest.get(1).map_or(Ok(3), |x| x.parse())?;
    let bytes = std::fs::read(file)?;
    let values = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    drop(bytes);
    let n: usize = n.parse()?;
    let gain = Array2::from_shape_vec((n, n), values)?;

    let mut seconds = f64::INFINITY;
    let mut found = None;
    for _ in 0..repeats.max(1) {
        let start = Instant::now();
        found = Some(assign_within(gain.view(), relative_gap)?);
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let (objective, gap) = found.map_or((0.0, 0.0), |found| (found.objective, found.gap));
    println!("{}", serde_json::json!({ "seconds": seconds, "objective": objective, "gap": gap }));
    Ok(())
}
