//! The exponential as a scalar kernel that the compiler vectorises, and loops compiled for the
//! vectors that the machine at hand has.

/// Runs `f` compiled for AVX2 where the processor has it. Plain loops in an `#[inline(always)]`
/// closure become wider vector code with the same bits, for nothing in them may be fused.
pub(crate) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// `eˣ` with a relative error below 2e-7 for `|x| ≤ 87`; constant beyond.
///
/// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`; `eʳ` by the minimax polynomial of Cephes'
/// `expf`, in pairs to shorten the chain of dependent operations; `2ⁿ` by the exponent bits. NaN
/// gives NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
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
}
