//! What a device must be able to do. Ids: `linalg/<operation>/<device>/<shape>`; `--features gpu`
//! adds the rows of the preferred adapter. The data is made, and comes back, within the time: that
//! is what a caller waits for.
//!
//! `linalg/exp-after/<operation>` is the C library's `exp` on the thread of a product or an SVD:
//! both take as long as `linalg/exp-after/nothing`, or the operation leaves data in the upper
//! halves of the vector registers.

#![allow(missing_docs, clippy::unwrap_used)] // A bench fails by panicking.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mcsmoe::linalg::{Activation, Compute, Cpu, LinearView, Mlp, Product, Term, svd};
use ndarray::Array2;

/// Rows, depth, columns.
const SHAPES: [[usize; 3]; 2] = [[768, 2048, 768], [1408, 2048, 1408]];

fn matrix(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
    let value = |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1013) as f32 / 506.5 - 1.0;
    Array2::from_shape_fn((rows, cols), value)
}

fn devices() -> Vec<(&'static str, Box<dyn Compute>)> {
    let cpu: (&'static str, Box<dyn Compute>) = ("cpu", Box::new(Cpu::new()));
    #[cfg(feature = "gpu")]
    return vec![cpu, ("gpu", Box::new(mcsmoe::gpu::Gpu::new().unwrap()))];
    #[cfg(not(feature = "gpu"))]
    vec![cpu]
}

fn operations(c: &mut Criterion) {
    for (name, device) in devices() {
        for [m, k, n] in SHAPES {
            let (a, b) = (matrix(m, k, 1), matrix(n, k, 2));
            let (a_down, b_down) = (matrix(k, m, 3), matrix(k, n, 4));
            let shape = format!("{m}x{k}x{n}");
            let mut out = Array2::zeros((m, n));
            let flops = 2 * (m * k * n) as u64;
            let mut run = |operation: &str, flops: u64, work: &mut dyn FnMut()| {
                let mut group = c.benchmark_group(format!("linalg/{operation}/{name}"));
                group.sample_size(10).throughput(Throughput::Elements(flops));
                group.bench_function(BenchmarkId::from_parameter(&shape), |bench| {
                    bench.iter(&mut *work);
                });
            };
            run("gemm", flops, &mut || {
                device.gemm(1.0, a.view(), b.t(), 0.0, out.view_mut()).unwrap();
            });
            let product = |a, b| Product { alpha: 1.0, a, b };
            let gain = [
                product(a.view(), b.t()),
                product(a.view(), b.t()),
                product(a_down.t(), b_down.view()),
            ];
            run("gain", 3 * flops, &mut || device.gemm_sum(&gain, out.view_mut()).unwrap());
            run("gram", (m * k * m) as u64, &mut || {
                let mut gram = Array2::zeros((m, m));
                device.add_gram(a_down.view(), &mut gram).unwrap();
                black_box(&gram);
            });
            let turned: Vec<u32> = (0..m as u32).rev().collect();
            let term = Term { rows: Some(&turned), ..Term::plain(0.5, a.view()) };
            run("weighted-sum", 8 * (m * k) as u64, &mut || {
                black_box(device.weighted_sum(&[term; 4]).unwrap());
            });
            let linear = |weight| LinearView { weight, bias: None };
            let (x, mut y) = (matrix(256, k, 5), Array2::zeros((256, k)));
            let expert = Mlp {
                gate: Some(linear(a.view())),
                up: linear(a.view()),
                down: linear(a_down.view()),
                activation: Activation::Silu,
            };
            run("mlp", 6 * (256 * m * k) as u64, &mut || {
                device.mlp(&expert, x.view(), None, y.view_mut()).unwrap();
            });
        }
    }
}

/// Exponentials of the C library that are timed behind an operation.
const EXPONENTIALS: u64 = 1000;

fn exponentials(c: &mut Criterion) {
    let a = matrix(512, 512, 1);
    let mut out = Array2::zeros((512, 512));
    let mut product =
        || Cpu::sequential().gemm(1.0, a.view(), a.view(), 0.0, out.view_mut()).unwrap();
    let mut decomposition = || drop(black_box(svd(a.view()).unwrap()));
    let operations: [(&str, &mut dyn FnMut()); 3] =
        [("nothing", &mut || ()), ("gemm", &mut product), ("svd", &mut decomposition)];
    let mut group = c.benchmark_group("linalg/exp-after");
    group.sample_size(10).throughput(Throughput::Elements(EXPONENTIALS));
    for (name, operation) in operations {
        group.bench_function(name, |bench| {
            bench.iter_batched(
                &mut *operation,
                |()| (0..EXPONENTIALS).map(|i| black_box(i as f64 * -1e-3).exp()).sum::<f64>(),
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group!(benches, operations, exponentials);
criterion_main!(benches);
