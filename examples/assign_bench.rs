//! Times the assignment solver on a square matrix of raw little-endian `f32`, row by row.
//!
//! `assign_bench FILE N [RELATIVE_GAP [REPEATS]]` prints the least time of a solve, the objective
//! and the certified gap as one line of JSON. `tools/bench_assign.py` compares it with SciPy.

use std::error::Error;
use std::io::Write;
use std::time::Instant;

use mcsmoe::linalg::assign_within;
use ndarray::Array2;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(file), Some(n)) = (args.next(), args.next()) else {
        return Err("usage: assign_bench FILE N [RELATIVE_GAP [REPEATS]]".into());
    };
    let relative_gap: f64 = args.next().map_or(Ok(0.0), |x| x.parse())?;
    let repeats: usize = args.next().map_or(Ok(3), |x| x.parse())?;
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
    let line = serde_json::json!({ "seconds": seconds, "objective": objective, "gap": gap });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
