//! The MoE block of a forward pass: routing, experts and sum, over all tokens of a calibration set.
//!
//! Ids: `forward/moe/cpu/{shape}`. `tools/bench_forward.py` compares with torch.

#![allow(missing_docs, clippy::unwrap_used)]
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use mcsmoe::forward::{Choice, route, routed_sum};
use mcsmoe::model::{Expert, Grouping, LayerId, MergedLayer, Router, RoutingRule};
use mcsmoe::stage::Context;
use ndarray::Array2;
use rand::{Rng, SeedableRng};

const TOKENS: usize = 4096;

/// Uniform values of variance 1 / columns.
fn matrix(rows: usize, cols: usize, rng: &mut impl Rng) -> Array2<f32> {
    let scale = (12.0 / cols as f32).sqrt() / u32::MAX as f32;
    Array2::from_shape_simple_fn((rows, cols), || rng.next_u32() as f32 * scale)
        .map(|x| x - (3.0 / cols as f32).sqrt())
}

fn layer((d, f, n, k): (usize, usize, usize, usize)) -> MergedLayer {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut new = |rows, cols| matrix(rows, cols, &mut rng);
    let experts: Vec<Expert> =
        (0..n).map(|_| Expert::swiglu(new(f, d), new(f, d), new(d, f)).unwrap()).collect();
    let router = Router::new(new(n, d), None, None, RoutingRule::softmax(k, true)).unwrap();
    MergedLayer::new(LayerId::causal(0), experts, Grouping::identity(n), router, None).unwrap()
}

fn moe(c: &mut Criterion) {
    let cx = Context::cpu(0);
    let mut group = c.benchmark_group("forward/moe/cpu");
    group.sample_size(10);
    for (name, shape) in [("mixtral", (1024, 3584, 8, 2)), ("qwen", (1024, 384, 64, 8))] {
        let layer = layer(shape);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let x = matrix(TOKENS, shape.0, &mut rng) * (shape.0 as f32).sqrt();
        group.bench_function(name, |b| {
            b.iter(|| {
                let windows = std::slice::from_ref(&(0..TOKENS));
                let routed = route(&layer, Choice::Mapped, x.view(), windows, None, &cx).unwrap();
                black_box(routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, moe);
criterion_main!(benches);
