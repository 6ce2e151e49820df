//! Whole merges of one layer in memory. Ids:
//! `pipeline/<preset>/<device>/<experts>x<d_ff>x<d_model>`; `--features gpu` adds the rows of the
//! preferred adapter.

#![allow(missing_docs, clippy::unwrap_used)] // A bench fails by panicking.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mcsmoe::linalg::{Compute, Cpu};
use mcsmoe::model::{Expert, LayerId, MoeLayer, Router, RoutingRule, RoutingStats, Samples};
use mcsmoe::pipeline::{Keep, Recipe};
use ndarray::Array2;

const SHAPES: [(usize, usize, usize); 2] = [(8, 512, 256), (32, 192, 256)];

fn matrix(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
    let hash = |i: usize| (i.wrapping_mul(0x9e37_79b9) ^ (i >> 7)).wrapping_mul(0x85eb_ca6b) % 4093;
    Array2::from_shape_fn((rows, cols), |(i, j)| {
        hash(i * cols + j + seed * 7919) as f32 / 2046.5 - 1.0
    })
}

fn layer(n: usize, f: usize, d: usize) -> (MoeLayer, RoutingStats) {
    let expert = |i| Expert::swiglu(matrix(f, d, i), matrix(f, d, i + 99), matrix(d, f, i + 999));
    let experts = (0..n).map(|i| expert(i).unwrap()).collect();
    let router = Router::new(matrix(n, d, 5), None, None, RoutingRule::softmax(2, true)).unwrap();
    let layer = MoeLayer::new(LayerId::causal(0), experts, router).unwrap();
    let inputs = matrix(512, d, 6);
    let logits = layer.router().logits(inputs.view(), &Cpu::new()).unwrap();
    let routing = layer.router().route(logits.view()).unwrap();
    let mut counts = vec![0; n];
    routing.experts.iter().for_each(|&e| counts[e as usize] += 1);
    let stats = RoutingStats {
        logit_gram: Some(logits.mapv(f64::from).t().dot(&logits.mapv(f64::from))),
        reap: Some(counts.iter().map(|&c| c as f64).collect()),
        mean_output: Some(matrix(n, d, 7)),
        samples: Some(Samples { inputs, logits, routing, routed_output: None }),
        ..RoutingStats::from_counts(counts, 512)
    };
    (layer, stats)
}

fn merges(c: &mut Criterion) {
    for (n, f, d) in SHAPES {
        let (layer, stats) = layer(n, f, d);
        for &preset in Recipe::PRESETS {
            let mut recipe = Recipe::preset(preset, Keep::Fraction(0.5)).unwrap();
            recipe.measure_error = false;
            for (device, compute) in devices() {
                let builder = recipe.builder().unwrap().compute(compute);
                let pipeline = builder.build().unwrap();
                let mut group = c.benchmark_group(format!("pipeline/{preset}/{device}"));
                group.sample_size(10);
                let id = BenchmarkId::from_parameter(format!("{n}x{f}x{d}"));
                let (layers, stats) = (std::slice::from_ref(&layer), std::slice::from_ref(&stats));
                group.bench_function(id, |b| {
                    b.iter(|| black_box(pipeline.run().in_memory(layers, stats).unwrap()));
                });
            }
        }
    }
}

fn devices() -> Vec<(&'static str, Arc<dyn Compute>)> {
    let cpu: (&'static str, Arc<dyn Compute>) = ("cpu", Arc::new(Cpu::new()));
    #[cfg(feature = "gpu")]
    return vec![cpu, ("gpu", Arc::new(mcsmoe::gpu::Gpu::new().unwrap()))];
    #[cfg(not(feature = "gpu"))]
    vec![cpu]
}

criterion_group!(benches, merges);
criterion_main!(benches);
