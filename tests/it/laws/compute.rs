//! One runner over every device: whatever computes must say what the definition says, within the
//! rounding of its arithmetic, for every shape and layout.
//!
//! Without an adapter the GPU's half is skipped, with a message, unless `MCSMOE_REQUIRE_GPU=1`.

#![allow(clippy::print_stderr)] // A skipped device is told.

use mcsmoe::linalg::{
    Activation, Compute, Cpu, LinearView, Mlp, Product, PureRust, Randomized, Term, rsvd,
};
use ndarray::{Array1, Array2, ArrayView2, s};
use rayon::prelude::*;

/// Values in [−1, 1] with full mantissas, or in bf16.
fn matrix(rows: usize, cols: usize, seed: usize, bf16: bool) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| {
        let hash = (i * 7919 + j * 104_729 + seed * 31 + 17).wrapping_mul(2_654_435_761) % 100_003;
        let x = hash as f32 / 50_001.0 - 1.0;
        if bf16 { f32::from_bits(x.to_bits() & 0xffff_0000) } else { x }
    })
}

fn wide(a: ArrayView2<'_, f32>) -> Array2<f64> {
    a.mapv(f64::from)
}

/// Forward error of a sum of `k` products of values up to 1, in `f32`.
fn rounding(k: usize) -> f64 {
    f64::from(f32::EPSILON) * (k as f64 + 2.0)
}

fn assert_close(what: &str, found: &Array2<f64>, expected: &Array2<f64>, tolerance: f64) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    for ((at, f), e) in found.indexed_iter().zip(expected) {
        assert!((f - e).abs() <= tolerance, "{what} at {at:?}: {f} is not {e} ± {tolerance}");
    }
}

/// The devices that are here: the CPU, and the card whole and in small blocks.
fn devices() -> Vec<(String, Box<dyn Compute>)> {
    let cpus: [(String, Box<dyn Compute>); 2] = [
        ("cpu".into(), Box::new(Cpu::new())),
        ("cpu, one thread".into(), Box::new(Cpu::sequential())),
    ];
    cpus.into_iter().chain(cards()).collect()
}

#[cfg(not(feature = "gpu"))]
fn cards() -> Vec<(String, Box<dyn Compute>)> {
    Vec::new()
}

#[cfg(feature = "gpu")]
fn cards() -> Vec<(String, Box<dyn Compute>)> {
    use mcsmoe::gpu::{Gpu, Options};
    let mut found: Vec<(String, Box<dyn Compute>)> = Vec::new();
    for block_bytes in [None, Some(40_000), Some(1 << 10)] {
        match Gpu::with(&Options { block_bytes, ..Options::default() }) {
            Ok(gpu) => found.push((format!("{} {block_bytes:?}", gpu.name()), Box::new(gpu))),
            Err(e) => {
                let required = std::env::var("MCSMOE_REQUIRE_GPU").is_ok_and(|v| v == "1");
                assert!(!required, "MCSMOE_REQUIRE_GPU=1, but {e}");
                eprintln!("skipped on the GPU: {e}");
            }
        }
    }
    found
}

/// Empty, one, odd, prime, larger than a tile of 128 and, in small blocks, than a binding.
const SHAPES: [[usize; 3]; 10] = [
    [0, 3, 2],
    [2, 0, 3],
    [3, 4, 0],
    [1, 1, 1],
    [3, 5, 7],
    [17, 31, 13],
    [128, 16, 128],
    [131, 37, 139],
    [5, 301, 2],
    [260, 20, 9],
];

#[test]
fn products_of_every_shape_and_layout() {
    for (name, device) in devices() {
        for [m, k, n] in SHAPES {
            for bf16 in [false, true] {
                let (a, b) = (matrix(m, k, 1, bf16), matrix(k, n, 2, bf16));
                let (at, bt) = (matrix(k, m, 3, bf16), matrix(n, k, 4, bf16));
                let every_other = matrix(m, 2 * k, 5, bf16);
                let strided = every_other.slice(s![.., ..;2]);
                for (left, right) in [
                    (a.view(), b.view()),
                    (a.view(), bt.t()),
                    (at.t(), b.view()),
                    (at.t(), bt.t()),
                    (strided, b.slice(s![.., ..;-1])),
                ] {
                    let expected = wide(left).dot(&wide(right));
                    let mut out = Array2::from_elem((m, n), f32::NAN);
                    device.gemm(1.0, left, right, 0.0, out.view_mut()).unwrap();
                    let what = format!("{name}: {m}x{k}x{n}");
                    assert_close(&what, &wide(out.view()), &expected, rounding(k));
                }
            }
        }
    }
}

#[test]
fn products_scale_accumulate_and_add_up() {
    let (a, b, c) = (matrix(133, 40, 1, false), matrix(40, 29, 2, true), matrix(133, 3, 3, false));
    let (d, old) = (matrix(3, 29, 4, false), matrix(133, 29, 5, false));
    for (name, device) in devices() {
        let mut out = Array2::from_elem((266, 29), f32::NAN);
        let mut part = out.slice_mut(s![..;2, ..]);
        part.assign(&old);
        device.gemm(-2.0, a.view(), b.view(), 0.5, part.view_mut()).unwrap();
        let expected = wide(a.view()).dot(&wide(b.view())) * -2.0 + wide(old.view()) * 0.5;
        assert_close(&name, &wide(part.view()), &expected, 2.0 * rounding(40));
        let terms = [
            Product { alpha: 1.0, a: a.view(), b: b.view() },
            Product { alpha: 0.25, a: c.view(), b: d.view() },
        ];
        device.gemm_sum(&terms, part.view_mut()).unwrap();
        let second = wide(c.view()).dot(&wide(d.view())) * 0.25;
        let expected = wide(a.view()).dot(&wide(b.view())) + second;
        assert_close(&name, &wide(part.view()), &expected, rounding(43));
        assert!(out.slice(s![1..;2, ..]).iter().all(|x| x.is_nan()), "{name}: other rows");
        device.gemm_sum(&[], out.view_mut()).unwrap();
        assert!(out.iter().all(|&x| x == 0.0));
    }
}

#[test]
fn gram_matrices_keep_far_more_than_f32() {
    for (name, device) in devices() {
        for (t, p) in [(0, 3), (1, 1), (2, 5), (1000, 7), (67, 131), (33, 64)] {
            let x = matrix(t, p, 6, false);
            let columns = matrix(p, t, 7, true);
            for x in [x.view(), columns.t()] {
                let mut gram = Array2::from_elem((p, p), 3.0);
                device.add_gram(x, &mut gram).unwrap();
                let expected = wide(x).t().dot(&wide(x)) + 3.0;
                // 36 bits of every product; a sum in f32 would be wrong by `rounding(t)`.
                let tolerance = 2f64.powi(-34) * (t as f64 + 4.0);
                assert_close(&format!("{name}: {t}x{p}"), &gram, &expected, tolerance);
                assert_eq!(gram, gram.t(), "{name}: symmetric");
            }
        }
    }
}

#[test]
fn a_gram_matrix_sees_a_direction_that_f32_would_lose() {
    // Two columns that differ by 2⁻¹⁴: the small eigenvalue is 2⁻²⁹ of the large one.
    let base = matrix(500, 1, 8, true);
    let x = Array2::from_shape_fn((500, 2), |(i, j)| {
        base[[i, 0]] + if j == 1 && i % 2 == 0 { 2f32.powi(-14) } else { 0.0 }
    });
    for (name, device) in devices() {
        let mut gram = Array2::zeros((2, 2));
        device.add_gram(x.view(), &mut gram).unwrap();
        let gap = gram[[0, 0]] + gram[[1, 1]] - 2.0 * gram[[0, 1]];
        let difference = wide(x.view()).column(1).to_owned() - wide(x.view()).column(0);
        let expected = difference.dot(&difference);
        assert!((gap / expected - 1.0).abs() < 2e-3, "{name}: {gap} {expected}");
    }
}

#[test]
fn weighted_sums_gather_rows_and_columns() {
    for (name, device) in devices() {
        for (rows, cols) in [(0, 2), (1, 1), (7, 11), (67, 130), (3, 600), (300, 5)] {
            let reversed: Vec<u32> = (0..rows as u32).rev().collect();
            let turned: Vec<u32> = (0..cols as u32).map(|c| (c + 1) % cols as u32).collect();
            let (a, b, c) = (
                matrix(rows, cols, 1, true),
                matrix(rows, cols, 2, false),
                matrix(cols, rows, 3, true),
            );
            let terms = [
                Term::plain(0.5, a.view()),
                Term { rows: Some(&reversed), ..Term::plain(-1.5, b.view()) },
                Term { cols: Some(&turned), ..Term::plain(0.25, c.t()) },
                Term { rows: Some(&reversed), cols: Some(&turned), ..Term::plain(1.0, b.view()) },
            ];
            let found = device.weighted_sum(&terms).unwrap();
            let expected = Array2::from_shape_fn((rows, cols), |(i, j)| {
                let (r, t) = (reversed[i] as usize, turned[j] as usize);
                let of = |m: &Array2<f32>, i, j| f64::from(m[[i, j]]);
                0.5 * of(&a, i, j) - 1.5 * of(&b, r, j) + 0.25 * of(&c, t, i) + of(&b, r, t)
            });
            assert_close(&format!("{name}: {rows}x{cols}"), &wide(found.view()), &expected, 1e-6);
            // One term of weight 1 is a copy, bit for bit.
            let copy = device.weighted_sum(&[Term::plain(1.0, b.view())]).unwrap();
            assert_eq!(copy.mapv(f32::to_bits), b.mapv(f32::to_bits), "{name}");
        }
    }
}

#[test]
fn experts_of_every_activation() {
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 0.4 };
    let kinds =
        [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, clamped];
    let bias = |n: usize| Array1::from_shape_fn(n, |i| i as f32 * 0.01 - 0.1);
    for (name, device) in devices() {
        for (t, d, f) in [(0, 3, 2), (1, 1, 1), (9, 17, 23), (70, 12, 140)] {
            for (i, act) in kinds.into_iter().enumerate() {
                let (gate, up) = (matrix(f, d, i, true), matrix(f, d, i + 9, false));
                let (down, x) = (matrix(d, f, i + 20, true), matrix(t, d, i + 30, false));
                let (f_bias, d_bias) = (bias(f), bias(d));
                let weights: Vec<f32> = (0..t).map(|i| 0.1 * i as f32 - 0.3).collect();
                let biased = i % 2 == 0;
                let linear = |weight, bias| LinearView { weight, bias: biased.then_some(bias) };
                let parts = Mlp {
                    gate: (i != 3).then(|| linear(gate.view(), f_bias.view())),
                    up: linear(up.view(), f_bias.view()),
                    down: linear(down.view(), d_bias.view()),
                    activation: act,
                };
                let what = format!("{name}: {act:?} {t}x{d}x{f}");
                let hidden = device.hidden(&parts, x.view()).unwrap();
                let (inner, outer) = oracle(&parts, x.view(), &weights);
                let tolerance = 2.0 * rounding(2 * d + 8) * (1.0 + peak(&inner));
                assert_close(&what, &wide(hidden.view()), &inner, tolerance);
                let mut out = Array2::from_elem((t, d), f32::NAN);
                device.mlp(&parts, x.view(), Some(&weights), out.view_mut()).unwrap();
                let scale = (1.0 + peak(&inner)) * (1.0 + 0.1 * t as f64);
                let tolerance = rounding(2 * d + 8) * 2.0 * f as f64 * scale;
                assert_close(&what, &wide(out.view()), &outer, tolerance);
            }
        }
    }
}

fn peak(a: &Array2<f64>) -> f64 {
    a.iter().fold(0.0, |peak, x| peak.max(x.abs()))
}

/// Hidden activations and weighted outputs; products in f64, the activation itself in f32.
fn oracle(mlp: &Mlp<'_>, x: ArrayView2<'_, f32>, w: &[f32]) -> (Array2<f64>, Array2<f64>) {
    let project = |linear: &LinearView<'_>, x: &Array2<f64>| {
        let mut out = x.dot(&wide(linear.weight).t());
        if let Some(bias) = linear.bias {
            out += &bias.mapv(f64::from);
        }
        out
    };
    let (x, act) = (wide(x), mlp.activation);
    let up = project(&mlp.up, &x);
    let hidden = match &mlp.gate {
        None => up.mapv(|z| f64::from(act.apply(z as f32))),
        Some(gate) => {
            let mut gate = project(gate, &x);
            gate.zip_mut_with(&up, |g, &u| *g = f64::from(act.gate(*g as f32, u as f32)));
            gate
        }
    };
    let mut out = project(&mlp.down, &hidden);
    out.rows_mut().into_iter().zip(w).for_each(|(mut row, &w)| row *= f64::from(w));
    (hidden, out)
}

#[test]
fn held_matrices_and_the_randomised_svd() {
    let a = matrix(210, 150, 1, false);
    let b = matrix(150, 40, 2, false);
    let reference = {
        let found = rsvd(a.view(), 6, &Randomized::default(), 5, &Cpu::new(), &PureRust).unwrap();
        assert!(!found.fell_back);
        found
    };
    for (name, device) in devices() {
        if let Some(held) = device.upload(a.view()).unwrap() {
            let mut out = Array2::zeros((210, 40));
            held.multiply(false, b.view(), out.view_mut()).unwrap();
            let expected = wide(a.view()).dot(&wide(b.view()));
            assert_close(&name, &wide(out.view()), &expected, rounding(150));
            let mut back = Array2::zeros((150, 40));
            held.multiply(true, out.view(), back.view_mut()).unwrap();
            let expected = wide(a.view()).t().dot(&wide(out.view()));
            assert_close(&name, &wide(back.view()), &expected, 20.0 * rounding(210));
            assert!(held.multiply(true, b.view(), back.view_mut()).is_err());
            let squares = held.row_squares().unwrap();
            for (square, row) in squares.iter().zip(wide(a.view()).rows()) {
                assert!((square - row.dot(&row)).abs() <= 2f64.powi(-34) * 154.0, "{name}");
            }
        }
        let found = rsvd(a.view(), 6, &Randomized::default(), 5, &*device, &PureRust).unwrap();
        assert_eq!(found.products, reference.products, "{name}");
        for (f, r) in found.svd.s.iter().zip(&reference.svd.s) {
            assert!((f / r - 1.0).abs() <= 1e-5, "{name}: {f} {r}");
        }
        assert!((found.residual / reference.residual - 1.0).abs() < 1e-5, "{name}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let a = matrix(3, 4, 1, false);
    for (_, device) in devices() {
        assert!(
            device.gemm(1.0, a.view(), a.view(), 0.0, Array2::zeros((3, 4)).view_mut()).is_err()
        );
        assert!(device.add_gram(a.view(), &mut Array2::zeros((3, 3))).is_err());
        assert!(device.weighted_sum(&[]).is_err());
        let beyond = Term { rows: Some(&[0, 1, 3]), ..Term::plain(1.0, a.view()) };
        assert!(device.weighted_sum(&[beyond]).is_err());
        let linear = LinearView { weight: a.view(), bias: None };
        let parts = Mlp { gate: None, up: linear, down: linear, activation: Activation::Relu };
        assert!(device.mlp(&parts, a.view(), None, Array2::zeros((3, 3)).view_mut()).is_err());
        assert!(device.hidden(&parts, a.t()).is_err());
    }
}

#[test]
fn the_same_device_gives_the_same_bits_from_many_threads() {
    let (a, b) = (matrix(140, 70, 1, false), matrix(70, 90, 2, true));
    for (name, device) in devices() {
        let product = |_| {
            let task = device.per_task();
            let mut out = Array2::zeros((140, 90));
            task.gemm(1.0, a.view(), b.view(), 0.0, out.view_mut())?;
            Ok(out.mapv(f32::to_bits))
        };
        let all = (0..12).into_par_iter().map(product).collect::<mcsmoe::Result<Vec<_>>>().unwrap();
        assert!(all.iter().all(|bits| *bits == all[0]), "{name}");
    }
}
