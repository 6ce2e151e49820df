//! The analytic gradients against central differences of the loss, written again in `f64` by the
//! definitions. The choice of experts is held fixed: it is not differentiated.

use ndarray::{Array1, Array2};

use super::adam::Param;
use super::trainable_layer::{TrainStep, TrainableLayer};
use crate::model::{
    Activation, Expert, GroupScore, Grouping, LayerId, Linear, MergedLayer, Router, RoutingGroups,
    RoutingRule, Score,
};
use crate::stage::{Context, Recovery};

const D: usize = 5;
const F: usize = 4;
const TOKENS: usize = 24;

fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| {
        ((i * 131 + j * 71 + seed * 37 + 5) as f32 * 0.6137).sin()
    })
}

fn linear(rows: usize, cols: usize, seed: usize) -> Linear {
    let bias = Some(values(1, rows, seed + 17).row(0).to_owned());
    Linear { weight: values(rows, cols, seed), bias }
}

fn layer(act: Activation, gated: bool, rule: RoutingRule) -> MergedLayer {
    let label = vec![Some(0), Some(1), Some(0), None, Some(2), Some(3), Some(1), Some(2)];
    let grouping = Grouping::new(label, vec![0, 1, 4, 5]).unwrap();
    let expert = |i: usize| {
        let gate = gated.then(|| linear(F, D, 3 * i));
        Expert::new(gate, linear(F, D, 3 * i + 1), linear(D, F, 3 * i + 2), act).unwrap()
    };
    let router = |rows: usize, seed| {
        let of = |seed| Some(values(1, rows, seed).row(0).mapv(|x| 0.2 * x));
        Router::new(values(rows, D, seed), of(seed + 1), of(seed + 2), rule).unwrap()
    };
    let (experts, narrow) = ((0..4).map(expert).collect(), router(4, 61));
    MergedLayer::new(LayerId::causal(0), experts, grouping, router(8, 71), Some(narrow)).unwrap()
}

/// The layer in `f64`: matrices of each expert, gate first, bias after weight; router and bias.
#[derive(Clone)]
struct Exact {
    parts: Vec<Vec<Array2<f64>>>,
    act: Activation,
    gated: bool,
    rule: RoutingRule,
    map: Vec<Option<usize>>,
    /// Chosen rows of every token.
    chosen: Array2<u32>,
}

impl Exact {
    fn unit(&self, gate: f64, up: f64) -> f64 {
        let swish = |x: f64, alpha: f64| x / (1.0 + (-alpha * x).exp());
        let (x, rest) = if self.gated { (gate, up) } else { (up, 1.0) };
        match self.act {
            Activation::Silu => swish(x, 1.0) * rest,
            Activation::Relu => x.max(0.0) * rest,
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh()) * rest
            }
            Activation::Gelu => {
                let h = x / 300.0;
                let at = |i: i32| (-0.5 * ((f64::from(i) + 0.5) * h).powi(2)).exp() * h;
                let below = (0..300).map(at).sum::<f64>() / (2.0 * std::f64::consts::PI).sqrt();
                x * (0.5 + below) * rest
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let limit = f64::from(limit);
                let rest = if self.gated { rest.clamp(-limit, limit) + 1.0 } else { 1.0 };
                swish(x.min(limit), f64::from(alpha)) * rest
            }
        }
    }

    fn expert(&self, e: usize, x: &Array1<f64>) -> Array1<f64> {
        let parts = &self.parts[e];
        let apply = |i: usize, x: &Array1<f64>| parts[i].dot(x) + parts[i + 1].row(0);
        let first = apply(0, x);
        let up = if self.gated { apply(2, x) } else { first.clone() };
        let hidden = Array1::from_shape_fn(F, |i| self.unit(first[i], up[i]));
        apply(parts.len() - 2, &hidden)
    }

    fn weights(&self, t: usize, x: &Array1<f64>) -> Vec<f64> {
        let router = self.parts.last().unwrap();
        let z = router[0].dot(x) + router[1].row(0);
        let p: Vec<f64> = match self.rule.score {
            Score::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
            Score::SoftmaxOfTopK => z.iter().map(|z| z.exp()).collect(),
            Score::Softmax => {
                let alive = |i: usize| if self.map[i].is_some() { z[i].exp() } else { 0.0 };
                let total: f64 = (0..z.len()).map(alive).sum();
                (0..z.len()).map(|i| alive(i) / total).collect()
            }
        };
        let mut w: Vec<f64> = self.chosen.row(t).iter().map(|&i| p[i as usize]).collect();
        if self.rule.renormalise || self.rule.score == Score::SoftmaxOfTopK {
            let total: f64 = w.iter().sum();
            w.iter_mut().for_each(|w| *w /= total);
        }
        w.iter().map(|w| w * f64::from(self.rule.scale)).collect()
    }

    fn loss(&self, x: &Array2<f32>, targets: &Array2<f32>, scale: f64) -> f64 {
        let mut loss = 0.0;
        for t in 0..TOKENS {
            let x = x.row(t).mapv(f64::from);
            let mut residual = -targets.row(t).mapv(f64::from);
            for (&row, w) in self.chosen.row(t).iter().zip(self.weights(t, &x)) {
                residual.scaled_add(w, &self.expert(self.map[row as usize].unwrap(), &x));
            }
            loss += 0.5 * scale * residual.dot(&residual);
        }
        loss
    }
}

fn check(act: Activation, gated: bool, rule: RoutingRule, narrowed: bool) {
    const SCALE: f64 = 0.125;
    let layer = layer(act, gated, rule);
    let (x, targets) = (values(TOKENS, D, 91) * 1.5, values(TOKENS, D, 92));
    let task = Recovery { inputs: x.view(), targets: targets.view(), narrowed, held_out: 0 };
    let cx = Context::cpu(0);
    let mut trainable = TrainableLayer::new(&layer, narrowed, TOKENS);
    let rows: Vec<usize> = (0..TOKENS).collect();
    let pass = trainable.forward(&task, &rows, &cx).unwrap();
    let (router, map) = layer.choosing(narrowed);
    let wide = |param: &Param| param.value.mapv(f64::from);
    let mut parts: Vec<Vec<_>> = trainable
        .experts
        .iter_mut()
        .map(|p| p.params().into_iter().map(|p| wide(p)).collect())
        .collect();
    parts.push(vec![wide(&trainable.gate.weight), wide(trainable.gate.bias.as_ref().unwrap())]);
    let chosen = pass.routing().experts.clone();
    let exact = Exact { parts, act, gated, rule: *router.rule(), map, chosen };
    let loss: f64 = trainable.residual(&pass).iter().map(|&m| f64::from(m).powi(2)).sum();
    approx::assert_relative_eq!(
        0.5 * SCALE * loss,
        exact.loss(&x, &targets, SCALE),
        max_relative = 1e-5
    );
    let step = TrainStep { experts: true, router: true, rate: 0.0 };
    trainable.backward(&pass, SCALE as f32, step, &cx).unwrap();
    let mut found: Vec<Vec<Array2<f32>>> = trainable
        .experts
        .iter_mut()
        .map(|p| p.params().into_iter().map(|p| p.gradient.clone()).collect())
        .collect();
    let gate = &trainable.gate;
    found.push(vec![gate.weight.gradient.clone(), gate.bias.as_ref().unwrap().gradient.clone()]);
    let largest = found.iter().flatten().flatten().fold(0.0f32, |m, g| m.max(g.abs()));
    let tolerance = 1e-4 * f64::from(largest);
    for (e, parts) in found.iter().enumerate() {
        for (p, gradient) in parts.iter().enumerate() {
            for ((i, j), &g) in gradient.indexed_iter() {
                let at = |h: f64| {
                    let mut moved = exact.clone();
                    moved.parts[e][p][[i, j]] += h;
                    moved.loss(&x, &targets, SCALE)
                };
                let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (f64::from(g) - expected).abs() < tolerance,
                    "{act:?}, gated {gated}, {rule:?}, narrowed {narrowed}, part {e}.{p} \
                     [{i}, {j}]: {g} instead of {expected}"
                );
            }
        }
    }
}

#[test]
fn gradients_of_every_activation_match_central_differences() {
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 1.1 };
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, clamped]
    {
        for gated in [true, false] {
            check(act, gated, RoutingRule::softmax(2, true), !gated);
        }
    }
}

#[test]
fn gradients_of_every_routing_match_central_differences() {
    let groups = Some(RoutingGroups { groups: 2, chosen: 1, score: GroupScore::TopTwoSum });
    let rule = |score, top_k, renormalise, groups| RoutingRule {
        score,
        top_k,
        renormalise,
        scale: 1.5,
        groups,
    };
    let rules = [
        rule(Score::Softmax, 1, false, None),
        rule(Score::Softmax, 3, false, None),
        rule(Score::Softmax, 3, true, None),
        rule(Score::SoftmaxOfTopK, 3, false, None),
        rule(Score::Sigmoid, 3, false, None),
        rule(Score::Sigmoid, 2, true, groups),
    ];
    for rule in rules {
        for narrowed in [true, false] {
            check(Activation::Silu, true, rule, narrowed);
        }
    }
}
