//! Factorisations of the shapes that experts have.
//!
//! Ids are `linalg/{method}/{m}x{n}[/{rank}]`, and with the feature `lapack` the same below
//! `lapack/`. Full decompositions run on one thread, LAPACK's with `OPENBLAS_NUM_THREADS=1`;
//! `tools/bench_svd.py` compares the same shapes with torch, whose matrices it shares.

#![allow(missing_docs, clippy::unwrap_used)] // A bench fails by panicking.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mcsmoe::linalg::{Compute, Cpu, LinalgBackend, PureRust, Randomized, SvdMethod, truncated_svd};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform entries: a flat spectrum, on which subspace iteration converges most slowly.
fn flat(m: usize, n: usize) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(m as u64);
    Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
}

fn decompositions(c: &mut Criterion) {
    backend(c, "linalg", &PureRust);
    #[cfg(feature = "lapack")]
    backend(c, "lapack", &mcsmoe::linalg::Lapack);
}

fn backend(c: &mut Criterion, name: &str, backend: &dyn LinalgBackend) {
    let (a, cpu) = (flat(2048, 768), Cpu::new());
    let mut gram = Array2::zeros((768, 768));
    cpu.add_gram(a.view(), &mut gram).unwrap();
    c.bench_function(&format!("{name}/svd/2048x768"), |b| b.iter(|| backend.svd(a.view())));
    c.bench_function(&format!("{name}/eigh/768x768"), |b| b.iter(|| backend.eigh(gram.view())));
    let run = || backend.cholesky(gram.view());
    c.bench_function(&format!("{name}/cholesky/768x768"), |b| b.iter(run));
    let thin = flat(2048, 128);
    c.bench_function(&format!("{name}/qr/2048x128"), |b| b.iter(|| backend.qr(thin.view())));
    let randomized = SvdMethod::Randomized(Randomized::default());
    for (way, method) in [("gram", SvdMethod::Gram), ("randomized", randomized)] {
        let run = || truncated_svd(a.view(), 64, method, 0, &cpu, backend);
        c.bench_function(&format!("{name}/{way}/2048x768/64"), |b| b.iter(run));
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
