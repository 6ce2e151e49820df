//! The non-linearities of experts.

use serde::{Deserialize, Serialize};

use crate::linalg::exp::{exp, vectorised};

/// The non-linearity `act` of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · σ(x)` (SwiGLU).
    Silu,
    /// `x · Φ(x)`, by the error function.
    Gelu,
    /// The `tanh` approximation of GELU (GeGLU in T5 v1.1 and Gemma).
    GeluTanh,
    /// `max(x, 0)` (Switch).
    Relu,
    /// `x · σ(α x)` with `x` cut off above a limit; a gate of it takes `u + 1` for the up
    /// projection `u`, which is cut off at both ends (gpt-oss).
    ClampedSwiglu {
        /// The slope `α` inside `σ`.
        alpha: f32,
        /// Where gate and up are cut off.
        limit: f32,
    },
}

impl Activation {
    /// `act(x)`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => {
                let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Self::Relu => x.max(0.0),
            Self::ClampedSwiglu { alpha, limit } => {
                let x = x.min(limit);
                x / (1.0 + (-alpha * x).exp())
            }
        }
    }

    /// A hidden unit of a gated expert, `act(gate) · up`; with the clamped kind
    /// `act(gate) · (up + 1)`, `up` within its limits.
    pub fn gate(self, gate: f32, up: f32) -> f32 {
        let up = match self {
            Self::ClampedSwiglu { limit, .. } => up.max(-limit).min(limit) + 1.0,
            _ => up,
        };
        self.apply(gate) * up
    }
}

/// `gate ← act(gate) ⊙ up`, as vector code where the kind has some; see [`Activation::gate`].
pub(crate) fn gated(act: Activation, gate: &mut [f32], up: &[f32]) {
    match act {
        Activation::Silu => vectorised(
            #[inline(always)]
            || gate.iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u),
        ),
        Activation::Relu => gate.iter_mut().zip(up).for_each(|(g, u)| *g = g.max(0.0) * u),
        act => gate.iter_mut().zip(up).for_each(|(g, u)| *g = act.gate(*g, *u)),
    }
}

/// `x ← act(x)`, likewise.
pub(crate) fn activate(act: Activation, x: &mut [f32]) {
    match act {
        Activation::Silu => vectorised(
            #[inline(always)]
            || x.iter_mut().for_each(|x| *x /= 1.0 + exp(-*x)),
        ),
        Activation::Relu => x.iter_mut().for_each(|x| *x = x.max(0.0)),
        act => x.iter_mut().for_each(|x| *x = act.apply(*x)),
    }
}

/// The error function, by Abramowitz and Stegun 7.1.26 in `f64`; absolute error below 1.5e-7.
fn erf(x: f32) -> f32 {
    let x = f64::from(x);
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let poly = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592]
        .iter()
        .fold(0.0, |acc, c| (acc + c) * t);
    ((1.0 - poly * (-x * x).exp()) * x.signum()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT_OSS: [(f32, f32, f32); 6] = [
        (0.5, 0.25, 0.437_985_54),
        (-2.0, 1.5, -0.160_853_43),
        (9.0, -8.0, -41.999_718),
        (-9.0, 3.0, -8.012_714e-6),
        (3.0, 7.5, 23.855_43),
        (1.0, -1.0, 0.0),
    ];

    #[test]
    fn erf_and_activations_match_known_values() {
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_9), (-1.0, -0.842_700_8), (3.0, 0.999_977_9)] {
            approx::assert_abs_diff_eq!(erf(x), y, epsilon = 3e-7);
        }
        approx::assert_abs_diff_eq!(Activation::Silu.apply(1.0), 0.731_058_6, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(Activation::Gelu.apply(1.0), 0.841_344_8, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(Activation::GeluTanh.apply(1.0), 0.841_192, epsilon = 1e-6);
        assert_eq!(Activation::Relu.apply(-2.0), 0.0);
        // As the gpt-oss block of transformers computes it.
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        for (gate, up, y) in GPT_OSS {
            approx::assert_relative_eq!(clamped.gate(gate, up), y, max_relative = 2e-6);
        }
        assert_eq!(Activation::Relu.gate(3.0, -2.0), -6.0);
    }

    #[test]
    fn activations_match_the_exact_ones() {
        let x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.01).collect();
        let up: Vec<f32> = x.iter().map(|x| 1.0 - x * 0.5).collect();
        for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let (mut alone, mut fused) = (x.clone(), x.clone());
            activate(act, &mut alone);
            gated(act, &mut fused, &up);
            for i in 0..x.len() {
                let exact = act.apply(x[i]);
                // Three roundings of f32 and the polynomial.
                let tolerance = 5e-7 * exact.abs() + 1e-20;
                assert!((alone[i] - exact).abs() <= tolerance, "{act:?}({}) {}", x[i], alone[i]);
                let product = (fused[i] - exact * up[i]).abs();
                assert!(product <= 2.0 * tolerance * up[i].abs().max(1.0), "{act:?}({})", x[i]);
            }
        }
    }
}
