//! Scalar kernels that the compiler vectorises: exponential, SiLU, softmax, sums over lanes.
//!
//! They are written without calls, branches or fused multiply-adds, so that one source becomes
//! vector code on every target, with the same bits.

use crate::model::Activation;

/// Independent partial sums of a reduction. Their order is part of the result.
const LANES: usize = 16;

/// `eˣ` with a relative error below 2e-7 for `|x| ≤ 87`; constant beyond.
///
/// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`; `eʳ` by the minimax polynomial of Cephes'
/// `expf`, in pairs to shorten the chain of dependent operations; `2ⁿ` by the exponent bits. NaN
/// gives NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to the nearest integer, which then stands in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let r2 = r * r;
    let high = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let middle = 8.333_452e-3 * r + 4.166_579_6e-2;
    let low = 1.666_666_6e-1 * r + 0.5;
    let p = (high * r2 + middle) * r2 + low;
    let power = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
    (p * r2 + r + 1.0) * f32::from_bits(power)
}

/// `gate ← act(gate) ⊙ up`.
pub(super) fn gated(act: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match act {
        Activation::Silu => pairs.for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u),
        Activation::Relu => pairs.for_each(|(g, u)| *g = g.max(0.0) * u),
        act => pairs.for_each(|(g, u)| *g = act.gate(*g, *u)),
    }
}

/// `x ← act(x)`.
pub(super) fn activate(act: Activation, x: &mut [f32]) {
    match act {
        Activation::Silu => x.iter_mut().for_each(|x| *x /= 1.0 + exp(-*x)),
        Activation::Relu => x.iter_mut().for_each(|x| *x = x.max(0.0)),
        act => x.iter_mut().for_each(|x| *x = act.apply(*x)),
    }
}

/// Folds a slice into [`LANES`] partial results and those into one.
#[inline(always)]
fn fold(x: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, x)| *lane = step(*lane, *x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane = step(*lane, *x));
    lanes.into_iter().fold(start, join)
}

/// `Σ x²`.
pub(super) fn sum_squares(x: &[f32]) -> f32 {
    fold(x, 0.0, |sum, x| sum + x * x, |a, b| a + b)
}

/// The largest value; −∞ of nothing. NaN is passed over.
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(x, f32::NEG_INFINITY, larger, larger)
}

/// `x ← exp(x − max x)`; returns the sum of the result. NaN stays NaN.
pub(super) fn exp_shifted(x: &mut [f32]) -> f32 {
    let top = max(x);
    x.iter_mut().for_each(|x| *x = exp(*x - top));
    fold(x, 0.0, |sum, x| sum + x, |a, b| a + b)
}

/// `x ← softmax(x)`.
pub(super) fn softmax(x: &mut [f32]) {
    let scale = 1.0 / exp_shifted(x);
    x.iter_mut().for_each(|x| *x *= scale);
}

/// `1 / (1 + e⁻ˣ)`.
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln Σ exp(x)` in `f64`: the normaliser of a cross-entropy over a large vocabulary.
pub(super) fn log_sum_exp(x: &[f32]) -> f64 {
    let top = max(x);
    let mut sum = 0.0f64;
    for block in x.chunks(1024) {
        let mut part = 0.0f32;
        let (lanes, rest) = block.as_chunks::<LANES>();
        let mut sums = [0.0f32; LANES];
        for lane in lanes {
            sums.iter_mut().zip(lane).for_each(|(s, x)| *s += exp(x - top));
        }
        rest.iter().for_each(|x| part += exp(x - top));
        sum += f64::from(part) + sums.iter().map(|&s| f64::from(s)).sum::<f64>();
    }
    f64::from(top) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_ulp() {
        let worst = (-870_000..=870_000).map(|i| {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            ((f64::from(exp(x)) - exact) / exact).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 2e-7, "{worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38);
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

    #[test]
    fn softmax_sums_to_one_and_ignores_masked_scores() {
        let mut x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        x.push(f32::NEG_INFINITY);
        let exact: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((log_sum_exp(&x) - exact.ln()).abs() < 1e-6);
        let last = f64::from(x[5]).exp() / exact;
        softmax(&mut x);
        assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((f64::from(x[5]) - last).abs() < 1e-7);
        assert!(x[37] < 1e-30);
    }
}
