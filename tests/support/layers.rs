//! Seeded layers, experts and statistics for the law tests.

use mcsmoe::linalg::Cpu;
use mcsmoe::model::{
    Activation, Expert, LayerId, Linear, MoeLayer, Permutation, Router, RoutingRule, RoutingStats,
    Samples,
};
use ndarray::{Array1, Array2, Axis};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Roughly normal values: a sum of uniform ones, of variance 1.
pub(crate) fn matrix(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    let mut source = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || (source.next_u32() >> 8) as f32 / (1 << 24) as f32 - 0.5;
    Array2::from_shape_simple_fn((rows, cols), || (0..12).map(|_| uniform()).sum())
}

pub(crate) fn permutation(n: usize, seed: u64) -> Permutation {
    let mut source = ChaCha8Rng::seed_from_u64(seed);
    let mut units: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        units.swap(i, (source.next_u64() % (i as u64 + 1)) as usize);
    }
    Permutation::new(units).unwrap()
}

/// What kind of experts: matrices and biases.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) gated: bool,
    pub(crate) biased: bool,
}

pub(crate) const KINDS: [Kind; 4] = [
    Kind { gated: false, biased: false },
    Kind { gated: false, biased: true },
    Kind { gated: true, biased: false },
    Kind { gated: true, biased: true },
];

pub(crate) fn expert(kind: Kind, d: usize, f: usize, seed: u64) -> Expert {
    let linear = |rows: usize, cols: usize, seed: u64| Linear {
        weight: matrix(rows, cols, seed),
        bias: kind.biased.then(|| Array1::from_iter(matrix(1, rows, seed + 1))),
    };
    let seed = seed * 10;
    let gate = kind.gated.then(|| linear(f, d, seed + 4));
    let act = if kind.gated { Activation::Silu } else { Activation::Relu };
    Expert::new(gate, linear(f, d, seed), linear(d, f, seed + 2), act).unwrap()
}

/// The expert plus noise of a share of every hidden unit's row and column norm.
pub(crate) fn noisy(expert: &Expert, share: f32, seed: u64) -> Expert {
    let add = |linear: Linear, rows: bool, seed: u64| {
        let Linear { mut weight, mut bias } = linear;
        let mut noise = matrix(weight.nrows(), weight.ncols(), seed);
        let axis = Axis(if rows { 0 } else { 1 });
        for (mut w, mut e) in weight.axis_iter_mut(axis).zip(noise.axis_iter_mut(axis)) {
            let norms = (w.dot(&w).sqrt(), e.dot(&e).sqrt());
            e *= share * norms.0 / norms.1;
            w += &e;
        }
        if let Some(bias) = &mut bias {
            *bias *= 1.0 + share;
        }
        Linear { weight, bias }
    };
    let activation = expert.view().activation;
    let (gate, up, down) = expert.clone().into_parts();
    let gate = gate.map(|gate| add(gate, true, seed + 1));
    Expert::new(gate, add(up, true, seed + 2), add(down, false, seed + 3), activation).unwrap()
}

pub(crate) struct World {
    pub(crate) layer: MoeLayer,
    pub(crate) stats: RoutingStats,
}

/// A layer and everything that can be observed of it on `t` random tokens.
pub(crate) fn world(experts: Vec<Expert>, t: usize, seed: u64) -> World {
    let (n, d) = (experts.len(), experts[0].view().d_model());
    let gradients = experts.iter().zip(0..).map(|(e, i)| noisy(e, 2.0, seed + 7 * i)).collect();
    let rule = RoutingRule::softmax(2.min(n), true);
    let router = Router::new(matrix(n, d, seed + 100), None, None, rule).unwrap();
    let layer = MoeLayer::new(LayerId::causal(3), experts, router).unwrap();
    let inputs = matrix(t, d, seed + 101);
    let logits = layer.router().logits(inputs.view(), &Cpu::new()).unwrap();
    let routing = layer.router().route(logits.view()).unwrap();
    let wide = logits.mapv(f64::from);
    let visits = routing.by_expert(n);
    let mut mean_output = Array2::zeros((n, d));
    for (i, visits) in visits.iter().enumerate().filter(|(_, v)| !v.is_empty()) {
        let tokens: Vec<usize> = visits.iter().map(|(t, _)| *t).collect();
        let x = inputs.select(Axis(0), &tokens);
        let y = layer.experts()[i].view().forward(x.view(), &Cpu::new()).unwrap();
        mean_output.row_mut(i).assign(&y.mean_axis(Axis(0)).unwrap());
    }
    let stats = RoutingStats {
        logit_gram: Some(wide.t().dot(&wide)),
        mean_output: Some(mean_output),
        samples: Some(Samples { inputs, logits, routing, routed_output: None }),
        gradients: Some(gradients),
        ..RoutingStats::from_counts(visits.iter().map(|v| v.len() as u64).collect(), t as u64)
    };
    stats.validate(n, d).unwrap();
    World { layer, stats }
}

pub(crate) fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}
