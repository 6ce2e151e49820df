//! The assignment solver on the gains that alignment meets, exact and within 0.1 %.
//!
//! Ids are `linalg/assign/{mode}/{gains}/{n}`. One thread; `tools/bench_assign.py` compares the
//! same gains with SciPy.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mcsmoe::linalg::{Compute, Cpu, assign_within};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Nearly normal: the sum of four uniforms, scaled to variance 1.
fn normal(shape: (usize, usize), rng: &mut ChaCha8Rng) -> Array2<f32> {
    Array2::from_shape_simple_fn(shape, || {
        ((0..4).map(|_| rng.random::<f32>()).sum::<f32>() - 2.0) * 3.0_f32.sqrt()
    })
}

fn gains(kind: &str, n: usize) -> Array2<f32> {
    let rng = &mut ChaCha8Rng::seed_from_u64(n as u64);
    let d = if kind == "rank1" { 1 } else { (2 * n).min(2048) };
    let (a, mut b) = (normal((n, d), rng), normal((n, d), rng));
    if kind == "noisy" {
        // Row i of `a` is row n - 1 - i of `b`, under noise of eight times its size.
        b = b * 8.0 + a.slice(ndarray::s![..;-1, ..]);
    }
    let mut gain = Array2::zeros((n, n));
    let product = Cpu::new().gemm(1.0, a.view(), b.t(), 0.0, gain.view_mut());
    assert!(product.is_ok(), "{product:?}");
    gain
}

fn assign(c: &mut Criterion) {
    for kind in ["unrelated", "noisy", "rank1"] {
        for n in [512, 1408, 4096] {
            let gain = gains(kind, n);
            for (mode, relative_gap) in [("exact", 0.0), ("gap-0.1%", 1e-3)] {
                let id = format!("linalg/assign/{mode}/{kind}/{n}");
                c.bench_function(&id, |b| b.iter(|| assign_within(gain.view(), relative_gap)));
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = assign
}
criterion_main!(benches);
