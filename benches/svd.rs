//! Factorisations of the shapes that experts have.
//!
//! Ids are `linalg/{method}/{m}x{n}[/{rank}]`. Full decompositions run on one thread;
//! `tools/bench_svd.py` compares the same shapes with torch, whose matrices it shares.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mcsmoe::linalg::{Cpu, Randomized, SvdMethod, svd, truncated_svd};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform entries: a flat spectrum, on which subspace iteration converges most slowly.
fn flat(m: usize, n: usize) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(m as u64);
    Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
}

fn decompositions(c: &mut Criterion) {
    let a = flat(2048, 768);
    c.bench_function("linalg/svd/2048x768", |b| b.iter(|| svd(a.view())));
    let randomized = SvdMethod::Randomized(Randomized::default());
    for (name, method) in [("gram", SvdMethod::Gram), ("randomized", randomized)] {
        let run = || truncated_svd(a.view(), 64, method, 0, &Cpu::new());
        c.bench_function(&format!("linalg/{name}/2048x768/64"), |b| b.iter(run));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = decompositions
}
criterion_main!(benches);
