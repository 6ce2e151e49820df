//! Derivatives of the activations, for recoverers that train experts.

use super::activation::Activation;

impl Activation {
    /// `act′(x)`; where `act` has a corner, 0.
    pub fn derivative(self, x: f32) -> f32 {
        match self {
            Self::Silu => swish_derivative(x, 1.0),
            Self::Gelu => {
                let density = 0.398_942_3 * (-0.5 * x * x).exp();
                // Φ(x) = gelu(x) / x, which leaves 1/2 at 0.
                let below = if x == 0.0 { 0.5 } else { self.apply(x) / x };
                below + x * density
            }
            Self::GeluTanh => {
                let tanh = (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh();
                let inner = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
                0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
            }
            Self::Relu => f32::from(x > 0.0),
            Self::ClampedSwiglu { alpha, limit } if x < limit => swish_derivative(x, alpha),
            Self::ClampedSwiglu { .. } => 0.0,
        }
    }

    /// The derivatives of a hidden unit of a gated expert, [`Activation::gate`], by gate and by up.
    pub fn gate_derivatives(self, gate: f32, up: f32) -> (f32, f32) {
        match self {
            Self::ClampedSwiglu { limit, .. } => {
                let by_up = if up.abs() < limit { self.apply(gate) } else { 0.0 };
                (self.derivative(gate) * (up.max(-limit).min(limit) + 1.0), by_up)
            }
            _ => (self.derivative(gate) * up, self.apply(gate)),
        }
    }
}

/// Derivative of `x · σ(α x)`.
fn swish_derivative(x: f32, alpha: f32) -> f32 {
    let sigma = 1.0 / (1.0 + (-alpha * x).exp());
    sigma + alpha * x * sigma * (1.0 - sigma)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gate values in `f64`, by the definitions; the error function as an integral.
    fn exact(act: Activation, gate: f64, up: f64) -> f64 {
        let swish = |x: f64, alpha: f64| x / (1.0 + (-alpha * x).exp());
        match act {
            Activation::Silu => swish(gate, 1.0) * up,
            Activation::Relu => gate.max(0.0) * up,
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
                0.5 * gate * (1.0 + inner.tanh()) * up
            }
            Activation::Gelu => {
                let (steps, density) = (4000, |z: f64| (-0.5 * z * z).exp());
                let h = gate / f64::from(steps);
                let sum: f64 = (0..steps).map(|i| density((f64::from(i) + 0.5) * h) * h).sum();
                gate * (0.5 + sum / (2.0 * std::f64::consts::PI).sqrt()) * up
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let limit = f64::from(limit);
                swish(gate.min(limit), f64::from(alpha)) * (up.clamp(-limit, limit) + 1.0)
            }
        }
    }

    #[test]
    fn slopes_match_central_differences_in_f64() {
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 2.0 };
        let all =
            [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, clamped];
        let h = 1e-4;
        for act in all {
            for i in -25..25 {
                let (gate, up) = (f64::from(i) * 0.19 + 0.05, 0.71 - f64::from(i) * 0.13);
                let by_gate = exact(act, gate + h, up) - exact(act, gate - h, up);
                let by_up = exact(act, gate, up + h) - exact(act, gate, up - h);
                let found = act.gate_derivatives(gate as f32, up as f32);
                approx::assert_abs_diff_eq!(
                    f64::from(found.0),
                    by_gate / (2.0 * h),
                    epsilon = 1e-5
                );
                approx::assert_abs_diff_eq!(f64::from(found.1), by_up / (2.0 * h), epsilon = 1e-5);
            }
        }
        assert_eq!(Activation::Gelu.derivative(0.0), 0.5);
    }
}
