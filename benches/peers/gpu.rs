//! One operation on a GPU, and on the CPU if asked (`tools/bench_gpu.py`).
//!
//! ```text
//! cargo bench --features gpu --bench peers -- gpu adapters
//! cargo bench --features gpu --bench peers -- gpu gemm M K N [DEVICE] [REPEATS]
//! cargo bench --features gpu --bench peers -- gpu gain D_FF D_MODEL [DEVICE] [REPEATS]
//! cargo bench --features gpu --bench peers -- gpu layer N D_FF D_MODEL [DEVICE]
//! ```
//!
//! DEVICE is `cpu`, `gpu` (default; the preferred adapter) or part of an adapter's name. Prints one
//! JSON line with the least seconds of REPEATS (5). `gemm` and `gain` are printed twice: `seconds`
//! with the matrices on the way in and out, as a caller waits for them, and `resident`, where the
//! left matrix is on the device before. `gain` is the alignment's `C: (D_FF, D_FF)` of two gated
//! experts; `layer` merges N experts of a Mixtral-shaped layer to half as many.

use std::sync::Arc;
use std::time::Instant;

use mcsmoe::gpu::{Gpu, Options};
use mcsmoe::linalg::{Compute, Cpu, Product};
use mcsmoe::model::{Expert, LayerId, MoeLayer, Router, RoutingRule, RoutingStats};
use mcsmoe::pipeline::{Keep, Recipe};
use ndarray::Array2;

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let Some((operation, rest)) = args.split_first() else { return Err(USAGE.into()) };
    let sizes: Vec<usize> = rest.iter().map_while(|arg| arg.parse().ok()).collect();
    let rest = &rest[sizes.len()..];
    let device = rest.first().map_or("gpu", String::as_str);
    let repeats = rest.get(1).map_or(Ok(5), |n| n.parse())?;
    match (operation.as_str(), &sizes[..]) {
        ("adapters", []) => Gpu::adapters().iter().for_each(|a| println!("{a} {:?}", a.kind)),
        ("gemm", &[m, k, n]) => gemm(&*open(device)?, [m, k, n], repeats)?,
        ("gain", &[f, d]) => gain(&*open(device)?, f, d, repeats)?,
        ("layer", &[n, f, d]) => layer(open(device)?, [n, f, d])?,
        _ => return Err("unknown operation, or sizes missing".into()),
    }
    Ok(())
}

fn open(device: &str) -> Outcome<Arc<dyn Compute>> {
    Ok(match device {
        "cpu" => Arc::new(Cpu::new()),
        "gpu" => Arc::new(Gpu::new()?),
        name => Arc::new(Gpu::with(&Options::named(name))?),
    })
}

/// Full mantissas, so that nothing crosses as bf16.
fn matrix(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
    let value = |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1013) as f32 / 506.5 - 1.0;
    Array2::from_shape_fn((rows, cols), value)
}

/// The least seconds of some repeats, after one that is not counted.
fn least(repeats: usize, mut work: impl FnMut() -> mcsmoe::Result<()>) -> Outcome<f64> {
    let mut best = f64::INFINITY;
    work()?;
    for _ in 0..repeats {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn gemm(device: &dyn Compute, [m, k, n]: [usize; 3], repeats: usize) -> Outcome {
    let (a, b) = (matrix(m, k, 1), matrix(n, k, 2));
    let mut out = Array2::zeros((m, n));
    let seconds = least(repeats, || device.gemm(1.0, a.view(), b.t(), 0.0, out.view_mut()))?;
    let resident = match device.upload(a.view())? {
        None => seconds,
        Some(held) => least(repeats, || held.multiply(false, b.t(), out.view_mut()))?,
    };
    let (name, check) = (device.name(), out[[0, 0]]);
    println!(
        "{{\"device\": \"{name}\", \"seconds\": {seconds}, \"resident\": {resident}, \
         \"check\": {check}}}"
    );
    Ok(())
}

fn gain(device: &dyn Compute, f: usize, d: usize, repeats: usize) -> Outcome {
    let [a, b] = [1, 2].map(|seed| [matrix(f, d, seed), matrix(f, d, seed + 2)]);
    let (a_down, b_down) = (matrix(d, f, 5), matrix(d, f, 6));
    let product = |a, b| Product { alpha: 1.0, a, b };
    let terms = [
        product(a[0].view(), b[0].t()),
        product(a[1].view(), b[1].t()),
        product(a_down.t(), b_down.view()),
    ];
    let mut out = Array2::zeros((f, f));
    let seconds = least(repeats, || device.gemm_sum(&terms, out.view_mut()))?;
    let (name, check) = (device.name(), out[[0, 0]]);
    println!("{{\"device\": \"{name}\", \"seconds\": {seconds}, \"check\": {check}}}");
    Ok(())
}

/// The paper's merge of one layer in memory.
fn layer(device: Arc<dyn Compute>, [n, f, d]: [usize; 3]) -> Outcome {
    let expert = |i| Expert::swiglu(matrix(f, d, i), matrix(f, d, i + 99), matrix(d, f, i + 999));
    let experts = (0..n).map(expert).collect::<mcsmoe::Result<Vec<_>>>()?;
    let router = Router::new(matrix(n, d, 5), None, None, RoutingRule::softmax(2, true))?;
    let layer = MoeLayer::new(LayerId::causal(0), experts, router)?;
    let logits = matrix(512, n, 7).mapv(f64::from);
    let counts = (0..n as u64).map(|i| 100 + i).collect();
    let stats = RoutingStats {
        logit_gram: Some(logits.t().dot(&logits)),
        ..RoutingStats::from_counts(counts, 512)
    };
    let name = device.name().to_owned();
    let mut recipe = Recipe::preset("m-smoe", Keep::Fraction(0.5))?;
    recipe.measure_error = false;
    let pipeline = recipe.builder()?.compute(device).build()?;
    let start = Instant::now();
    let report = pipeline.run().in_memory(&[layer], &[stats])?.report;
    let (seconds, left) = (start.elapsed().as_secs_f64(), report.experts.after);
    println!("{{\"device\": \"{name}\", \"seconds\": {seconds}, \"experts\": {left}}}");
    Ok(())
}
