//! Scalar kernels that the compiler vectorises: exponential, SiLU, softmax, sums over lanes.
//!
//! They are written without calls, branches or fused multiply-adds, so that one source becomes
//! vector code on every target, with the same bits.

pub(crate) use crate::linalg::{activate, exp, gated};

/// Independent partial sums of a reduction. Their order is part of the result.
const LANES: usize = 16;

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
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    fold(x, 0.0, |sum, x| sum + x * x, |a, b| a + b)
}

/// The largest value; −∞ of nothing. NaN is passed over.
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(x, f32::NEG_INFINITY, larger, larger)
}

/// `x ← exp(x − max x)`; returns the sum of the result. NaN stays NaN.
pub(crate) fn exp_shifted(x: &mut [f32]) -> f32 {
    let top = max(x);
    x.iter_mut().for_each(|x| *x = exp(*x - top));
    fold(x, 0.0, |sum, x| sum + x, |a, b| a + b)
}

/// `x ← softmax(x)`.
pub(crate) fn softmax(x: &mut [f32]) {
    let scale = 1.0 / exp_shifted(x);
    x.iter_mut().for_each(|x| *x *= scale);
}

/// `x ← exp(x) / (exp(other) + Σ exp(x))`: softmax beside a logit that stands for nothing.
pub(crate) fn softmax_beside(x: &mut [f32], other: f32) {
    let top = max(x).max(other);
    x.iter_mut().for_each(|x| *x = exp(*x - top));
    let scale = 1.0 / (fold(x, 0.0, |sum, x| sum + x, |a, b| a + b) + exp(other - top));
    x.iter_mut().for_each(|x| *x *= scale);
}

/// `1 / (1 + e⁻ˣ)`.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln Σ exp(x)` in `f64`: the normaliser of a cross-entropy over a large vocabulary.
pub(crate) fn log_sum_exp(x: &[f32]) -> f64 {
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
    fn a_sink_takes_the_part_of_a_token_without_a_value() {
        for other in [-90.0, -1.0, 0.5, 40.0] {
            let x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
            let mut with = [x.clone(), vec![other]].concat();
            softmax(&mut with);
            let mut beside = x;
            softmax_beside(&mut beside, other);
            for (a, b) in beside.iter().zip(&with) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
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
