//! The element-wise loops of an expert's forward and backward pass, compiled for the vector
//! registers of the machine that runs them; all choices give the same bits.

use pulp::{Arch, Simd, WithSimd};

use crate::linalg::exp;
use crate::model::Activation;

/// `hidden ← act(gate) ⊙ up`; without a gate `hidden ← act(up)`.
pub(super) fn activate(act: Activation, gate: Option<&[f32]>, up: &[f32], hidden: &mut [f32]) {
    Arch::new().dispatch(Activate { act, gate, up, hidden });
}

struct Activate<'a> {
    act: Activation,
    gate: Option<&'a [f32]>,
    up: &'a [f32],
    hidden: &'a mut [f32],
}

impl WithSimd for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { act, gate, up, hidden } = self;
        let both = hidden.iter_mut().zip(up);
        match (gate, act) {
            (Some(gate), Activation::Silu) => {
                both.zip(gate).for_each(|((h, u), g)| *h = g / (1.0 + exp(-g)) * u);
            }
            (Some(gate), Activation::Relu) => {
                both.zip(gate).for_each(|((h, u), g)| *h = g.max(0.0) * u);
            }
            (Some(gate), act) => both.zip(gate).for_each(|((h, u), g)| *h = act.gate(*g, *u)),
            (None, Activation::Relu) => both.for_each(|(h, u)| *h = u.max(0.0)),
            (None, act) => both.for_each(|(h, u)| *h = act.apply(*u)),
        }
    }
}

/// One token's way back through an expert. In: gate and up projections, hidden activations `h`,
/// their upstream gradient `δ` before the token's weight `w`. Out: the weighted gradients
/// `w δ ⊙ ∂h` in place of gate and up, `w h` in place of `h`; returns `δ · h`, the gradient of `w`.
pub(super) struct Back<'a> {
    pub(super) act: Activation,
    pub(super) weight: f32,
    pub(super) delta: &'a [f32],
    pub(super) gate: Option<&'a mut [f32]>,
    pub(super) up: &'a mut [f32],
    pub(super) hidden: &'a mut [f32],
}

impl Back<'_> {
    pub(super) fn run(self) -> f32 {
        Arch::new().dispatch(self)
    }
}

/// Independent partial sums of a dot product. Their order is part of the result.
const LANES: usize = 16;

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((s, a), b)| *s += a * b);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.into_iter().sum::<f32>() + rest
}

impl WithSimd for Back<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let Self { act, weight, delta, gate, up, hidden } = self;
        let sum = dot(delta, hidden);
        hidden.iter_mut().for_each(|h| *h *= weight);
        let both = up.iter_mut().zip(delta);
        match (gate, act) {
            (Some(gate), Activation::Silu) => both.zip(gate).for_each(|((u, d), g)| {
                let sigma = 1.0 / (1.0 + exp(-*g));
                let (value, d) = (*g * sigma, d * weight);
                *g = d * *u * (sigma + value * (1.0 - sigma));
                *u = d * value;
            }),
            (Some(gate), act) => both.zip(gate).for_each(|((u, d), g)| {
                let (by_gate, by_up) = act.gate_derivatives(*g, *u);
                let d = d * weight;
                (*g, *u) = (d * by_gate, d * by_up);
            }),
            (None, Activation::Relu) => {
                both.for_each(|(u, d)| *u = if *u > 0.0 { d * weight } else { 0.0 });
            }
            (None, act) => both.for_each(|(u, d)| *u = d * weight * act.derivative(*u)),
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_kernels_agree_with_the_scalar_definitions() {
        let up: Vec<f32> = (0..203).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
        let gate: Vec<f32> = (0..203).map(|i| (i as f32 * 0.53).cos() * 4.0).collect();
        let delta: Vec<f32> = (0..203).map(|i| (i as f32 * 0.71).sin()).collect();
        for (act, gated) in [
            (Activation::Silu, true),
            (Activation::Relu, true),
            (Activation::Gelu, true),
            (Activation::Relu, false),
            (Activation::GeluTanh, false),
        ] {
            let mut hidden = vec![0.0; 203];
            activate(act, gated.then_some(&gate[..]), &up, &mut hidden);
            let (mut g, mut u, mut h) = (gate.clone(), up.clone(), hidden.clone());
            let back = Back {
                act,
                weight: 0.7,
                delta: &delta,
                gate: gated.then_some(&mut g[..]),
                up: &mut u,
                hidden: &mut h,
            };
            let sum = back.run();
            let expected: f32 = delta.iter().zip(&hidden).map(|(d, h)| d * h).sum();
            approx::assert_abs_diff_eq!(sum, expected, epsilon = 1e-4);
            for i in 0..203 {
                let near =
                    |a: f32, b: f32| assert!((a - b).abs() < 2e-6 * (1.0 + b.abs()), "{a} {b}");
                near(h[i], 0.7 * hidden[i]);
                if gated {
                    near(hidden[i], act.gate(gate[i], up[i]));
                    let (by_gate, by_up) = act.gate_derivatives(gate[i], up[i]);
                    near(g[i], 0.7 * delta[i] * by_gate);
                    near(u[i], 0.7 * delta[i] * by_up);
                } else {
                    near(hidden[i], act.apply(up[i]));
                    near(u[i], 0.7 * delta[i] * act.derivative(up[i]));
                }
            }
        }
    }
}
