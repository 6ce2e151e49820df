//! Recovery of one layer: an epoch of block distillation, and the joint least-squares fit.
//!
//! Ids: `recover/distill/{shape}`, `recover/least-squares/{shape}`. `tools/bench_distill.py`
//! compares the former with torch.

#![allow(missing_docs, clippy::unwrap_used)]
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use mcsmoe::model::{Expert, Grouping, LayerId, MergedLayer, Router, RoutingRule};
use mcsmoe::recover::{Distill, LeastSquares};
use mcsmoe::stage::{Context, Recoverer, Recovery};
use ndarray::Array2;
use rand::{Rng, SeedableRng};

/// Tokens of an epoch; as many again in 8 judge.
const TOKENS: usize = 8192;
const HELD_OUT: usize = TOKENS / 8;

/// `d_model`, `d_ff`, merged experts, experts per token.
type Shape = (usize, usize, usize, usize);

const SHAPES: [(&str, Shape); 3] = [
    ("mixtral-4e", (128, 256, 4, 2)),
    ("qwen3moe-16e", (128, 64, 16, 4)),
    ("wide-8e", (256, 512, 8, 2)),
];

/// Uniform values of variance 1 / columns.
fn matrix(rows: usize, cols: usize, rng: &mut impl Rng) -> Array2<f32> {
    let scale = (12.0 / cols as f32).sqrt() / u32::MAX as f32;
    Array2::from_shape_simple_fn((rows, cols), || rng.next_u32() as f32 * scale)
        .map(|x| x - (3.0 / cols as f32).sqrt())
}

fn layer((d, f, n, k): Shape, seed: u64) -> MergedLayer {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut new = |rows, cols| matrix(rows, cols, &mut rng);
    let experts: Vec<Expert> =
        (0..n).map(|_| Expert::swiglu(new(f, d), new(f, d), new(d, f)).unwrap()).collect();
    let router = Router::new(new(n, d), None, None, RoutingRule::softmax(k, true)).unwrap();
    MergedLayer::new(LayerId::causal(0), experts, Grouping::identity(n), router, None).unwrap()
}

fn recover(c: &mut Criterion) {
    let cx = Context::cpu(0);
    for (name, shape) in SHAPES {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let x = matrix(TOKENS + HELD_OUT, shape.0, &mut rng) * (shape.0 as f32).sqrt();
        let targets = layer(shape, 3).mapped_output(x.view(), cx.compute()).unwrap();
        let (inputs, targets) = (x.view(), targets.view());
        let task = Recovery { inputs, targets, narrowed: false, held_out: HELD_OUT };
        let start = layer(shape, 1);
        let recoverers: [&dyn Recoverer; 2] =
            [&Distill { epochs: 1, ..Distill::default() }, &LeastSquares::default()];
        for recoverer in recoverers {
            let mut group = c.benchmark_group(format!("recover/{}", recoverer.name()));
            group.sample_size(10);
            group.bench_function(name, |b| {
                b.iter(|| black_box(recoverer.recover(&task, start.clone(), &cx).unwrap()));
            });
            group.finish();
        }
    }
}

criterion_group!(benches, recover);
criterion_main!(benches);
