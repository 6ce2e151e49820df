//! Low rank plus sparse against tensors computed by the published code of MC-SMoE.

use crate::support::golden::Golden;
use mcsmoe::decompose::analysis::stable_rank;
use mcsmoe::decompose::platon::{CubicSchedule, ScoredRows, Sensitivity, surviving_rows};
use mcsmoe::decompose::{LowRankSparse, TruncatedSvd};
use mcsmoe::linalg::Cpu;
use mcsmoe::stage::{Context, Decomposer, RankBudget};
use ndarray::Array2;

/// Of the largest entry. The stored tensors are those of an `f32` SVD and up to 5e-6 from one in
/// `f64`. Only products of the factors are unique.
const TOLERANCE: f32 = 1e-5;

fn close(a: &Array2<f32>, b: &Array2<f32>, what: &str) {
    assert_eq!(a.dim(), b.dim(), "{what}");
    let scale = b.iter().fold(1.0f32, |s, x| s.max(x.abs()));
    assert!((a - b).iter().all(|e| e.abs() <= TOLERANCE * scale), "{what}: {}", a - b);
}

#[test]
fn factors_and_residuals_are_those_of_losparse() {
    let golden = Golden::open("losparse_svd");
    let w = golden.matrix("W");
    let cx = Context::cpu(0);
    let stable = stable_rank(w.view(), &cx).unwrap() as f32;
    approx::assert_relative_eq!(stable, golden.vector("stable_rank")[0], max_relative = 1e-6);
    for r in [1, 4, 8] {
        let part = |name: &str| golden.matrix(&format!("{name}{r}"));
        let (left, right, residual) = LowRankSparse::default().split(w.view(), r, &cx).unwrap();
        assert_eq!((left.dim(), right.dim()), (part("L").dim(), part("R").dim()));
        close(&left.dot(&right), &part("L").dot(&part("R")), "L R");
        close(&residual, &part("S"), "S");
        // Balanced alike: the Gram matrices of the factors do not depend on signs.
        close(
            &left.t().dot(&left).mapv(f32::abs),
            &part("L").t().dot(&part("L")).mapv(f32::abs),
            "LᵀL",
        );
        let low =
            TruncatedSvd::default().decompose(w.view(), None, &RankBudget::rank(r), &cx).unwrap();
        close(&low.to_dense(&Cpu::new()).unwrap(), &part("L").dot(&part("R")), "svd");
    }
}

/// Twenty steps of the published pruner on two matrices that share one threshold: `A{t}` and
/// `B{t}` before step `t`, `gA{t}` and `gB{t}` their gradients, `trace[t]` the kept share and the
/// threshold (−1 where nothing was masked).
#[test]
fn twenty_steps_of_the_published_pruner() {
    let golden = Golden::open("losparse_platon");
    let schedule = CubicSchedule { final_share: 0.25, start: 1, hold: 4, steps: 20 };
    let mut parts: Vec<(&str, Array2<f32>)> =
        ["A", "B"].map(|name| (name, golden.matrix(&format!("{name}0")))).into();
    let mut seen: Vec<Sensitivity> =
        parts.iter().map(|(_, s)| Sensitivity::new(s.dim(), Sensitivity::BETA).unwrap()).collect();
    let trace = golden.doubles("trace");
    let mut masked = 0;
    for t in 0..20 {
        for ((name, s), seen) in parts.iter().zip(&mut seen) {
            seen.observe(s.view(), golden.matrix(&format!("g{name}{t}")).view()).unwrap();
        }
        let scores: Vec<_> = seen.iter().map(Sensitivity::row_scores).collect();
        let lines: Vec<_> = scores
            .iter()
            .zip(&parts)
            .map(|(scores, (_, s))| ScoredRows { scores, width: s.ncols() })
            .collect();
        let share = schedule.share(t).unwrap();
        approx::assert_abs_diff_eq!(share, trace[[t as usize, 0]], epsilon = 1e-12);
        let (kept, threshold) = surviving_rows(&lines, share).unwrap();
        approx::assert_abs_diff_eq!(
            threshold.unwrap_or(-1.0),
            trace[[t as usize, 1]],
            epsilon = 1e-7
        );
        for ((name, s), kept) in parts.iter_mut().zip(&kept) {
            for (i, mut row) in s.rows_mut().into_iter().enumerate() {
                if !kept.contains(&(i as u32)) {
                    row.fill(0.0);
                    masked += 1;
                }
            }
            assert_eq!(*s, golden.matrix(&format!("{name}{}", t + 1)), "{name} after step {t}");
        }
    }
    assert!(masked > 0);
}
