//! Clean vector registers after calls of hand-written kernels.
//!
//! `faer` multiplies by assembly kernels that return with data in the upper halves of the vector
//! registers. Code compiled for SSE, the C library's mathematics and most of the standard library
//! among it, then merges with those halves: each such instruction waits for the one before. On an
//! Intel Xeon `exp` took 20 to 40 times as long after a product, on an AMD EPYC (Zen 5) 4 times,
//! until some AVX function returned. Results are not affected, only time.

/// Runs `f`, a call of `faer`, and clears what it leaves in the upper halves of the vector
/// registers. One instruction of a few cycles.
///
/// Registers belong to a thread: a parallel task wraps its own calls.
pub(super) fn with_clean_registers<R>(f: impl FnOnce() -> R) -> R {
    let result = f();
    clear_upper_halves();
    result
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn clear_upper_halves() {
    if let Some(avx) = pulp::core_arch::x86::Avx::try_new() {
        avx._mm256_zeroupper();
    }
}

/// Other processors have no such halves.
#[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
fn clear_upper_halves() {}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use ndarray::Array2;

    use crate::linalg::{Compute, Cpu, PureRust, add_cross, eigh, qr, solve_lower, svd};

    type Call<'a> = (&'static str, Box<dyn FnMut() + 'a>);

    /// Whether a vector register of this thread has data in its upper half, which XGETBV with
    /// ECX = 1 tells: bit 2 of the state components in use. `None` where the processor does not.
    #[allow(unsafe_code, unused_unsafe)] // CPUID is safe to call from Rust 1.91 or so only.
    fn upper_halves_in_use() -> Option<bool> {
        use std::arch::x86_64::__cpuid_count;
        let avx = std::arch::is_x86_feature_detected!("avx");
        // CPUID 0xD, sub-leaf 1: EAX bit 2 says that XGETBV takes ECX = 1.
        // SAFETY: every processor of this architecture has CPUID.
        let answers = avx && unsafe { __cpuid_count(0xd, 1) }.eax & 4 != 0;
        answers.then(|| {
            let low: u32;
            // SAFETY: the processor has the instruction and the system has enabled it (AVX was
            // detected); it reads a register and writes EAX and EDX.
            unsafe {
                std::arch::asm!("xgetbv", in("ecx") 1, out("eax") low, out("edx") _,
                    options(nomem, nostack, preserves_flags));
            }
            low & 4 != 0
        })
    }

    #[test]
    fn no_product_or_factorisation_leaves_data_in_the_upper_halves() {
        let a = Array2::from_shape_fn((130, 130), |(i, j)| ((i * 31 + j * 17) % 101) as f32);
        let wide = a.mapv(f64::from);
        let spd = wide.t().dot(&wide) + Array2::<f64>::eye(130);
        let mut out = Array2::zeros((130, 130));
        let mut sums = Array2::<f64>::zeros((130, 130));
        let mut calls: Vec<Call<'_>> = vec![
            (
                "gemm",
                Box::new(|| {
                    Cpu::sequential().gemm(1.0, a.view(), a.t(), 0.0, out.view_mut()).unwrap();
                }),
            ),
            (
                "add_cross",
                Box::new(|| {
                    add_cross(a.view(), a.view(), sums.view_mut()).unwrap();
                }),
            ),
            ("svd", Box::new(|| drop(svd(a.view()).unwrap()))),
            ("qr", Box::new(|| drop(qr(a.view()).unwrap()))),
            ("eigh", Box::new(|| drop(eigh(spd.view()).unwrap()))),
            ("solve_lower", Box::new(|| drop(solve_lower(spd.view(), spd.view()).unwrap()))),
            (
                "solve_spd",
                Box::new(|| {
                    use crate::linalg::LinalgBackend;
                    // On one thread, so that every task is of this one.
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
                    pool.build().unwrap().install(|| {
                        PureRust.solve_spd(spd.view(), spd.view()).unwrap();
                    });
                }),
            ),
        ];
        for (name, call) in &mut calls {
            call();
            if let Some(in_use) = upper_halves_in_use() {
                assert!(!in_use, "{name}");
            }
        }
    }
}
