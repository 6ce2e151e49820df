//! Laws of the decomposers on random matrices and inputs, through the public API.

#[allow(dead_code)]
use crate::support::backends::contexts;
use mcsmoe::decompose::platon::{ScoredRows, surviving_rows};
use mcsmoe::decompose::ranks::{Allocation, Spectrum, allocate, by_energy, by_ratio};
use mcsmoe::decompose::{
    Complement, Job, LowRankSparse, RowScore, SparseOnly, TruncatedSvd, Whitened, Whitening,
    decompose_all,
};
use mcsmoe::linalg::{Cpu, SvdMethod, singular_values};
use mcsmoe::model::{Factored, Structure};
use mcsmoe::stage::{Context, Decomposer, Moments, RankBudget};
use mcsmoe::{ErrorKind, Result};
use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn config() -> Config {
    // Seeded, so that every run tries the same cases.
    let rng_seed = RngSeed::Fixed(2310);
    Config { cases: 48, failure_persistence: None, rng_seed, ..Config::default() }
}

fn matrix(m: usize, n: usize, rng: &mut ChaCha8Rng) -> Array2<f32> {
    Array2::from_shape_simple_fn((m, n), || rng.random_range(-1.0..1.0))
}

/// A matrix, correlated inputs of it, and a budget that fits.
#[derive(Debug, Clone)]
struct Case {
    w: Array2<f32>,
    x: Array2<f32>,
    moments: Moments,
    budget: RankBudget,
    structure: Structure,
}

prop_compose! {
    fn cases()(m in 2..24usize, n in 2..24usize, seed in any::<u64>(), columns in any::<bool>())
        (rank in 0..=m.min(n), share in 0.0..1.0f64, m in Just(m), n in Just(n), seed in Just(seed),
            structure in Just(if columns { Structure::Columns } else { Structure::Rows }))
        -> Case
    {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w = matrix(m, n, &mut rng);
        // Mixed and scaled by feature, so that the moments are far from a multiple of the identity.
        let mut x = matrix(3 * n, n, &mut rng).dot(&matrix(n, n, &mut rng));
        for (i, mut column) in x.columns_mut().into_iter().enumerate() {
            column *= 1.0 + (i % 5) as f32 * 2.0;
        }
        let rows = (share * structure.count((m, n)) as f64) as usize;
        let rows = if rank == 0 { rows.max(1) } else { rows };
        let moments = Moments::of(x.view(), &Cpu::new()).unwrap();
        Case { w, x, moments, budget: RankBudget { rank, rows }, structure }
    }
}

fn squared(a: ArrayView2<'_, f32>) -> f64 {
    a.iter().map(|&x| f64::from(x).powi(2)).sum()
}

fn dense(factored: &Factored) -> Array2<f32> {
    factored.to_dense(&Cpu::new()).unwrap()
}

/// Mean of `‖(W − Ŵ) x‖²` over the inputs.
fn output_error(case: &Case, factored: &Factored) -> f64 {
    squared((&case.w - &dense(factored)).dot(&case.x.t()).view()) / case.x.nrows() as f64
}

fn weight_error(case: &Case, factored: &Factored) -> f64 {
    squared((&case.w - &dense(factored)).view())
}

fn energy(sigma: &[f32]) -> f64 {
    sigma.iter().map(|&s| f64::from(s).powi(2)).sum()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn truncated_svd_meets_eckart_and_young_with_equality(case in cases()) {
        let rank = case.budget.rank.max(1);
        let sigma = singular_values(case.w.view()).unwrap();
        for cx in contexts(1) {
            for svd in [SvdMethod::Full, SvdMethod::Gram, SvdMethod::Auto] {
                let found = TruncatedSvd { svd }
                    .decompose(case.w.view(), None, &RankBudget::rank(rank), &cx)
                    .unwrap();
                let (error, best) = (weight_error(&case, &found), energy(&sigma[rank..]));
                prop_assert!((error - best).abs() <= 1e-5 * energy(&sigma), "{error} {best}");
            }
        }
    }

    #[test]
    fn whitened_svd_meets_its_identity_and_beats_the_plain_one(case in cases()) {
        for cx in contexts(1) {
            let budget = RankBudget::rank(case.budget.rank.max(1));
            let how = Whitened { damping: 1e-6, svd: SvdMethod::Full };
            let found = how.decompose(case.w.view(), Some(&case.moments), &budget, &cx).unwrap();
            let whitening = Whitening::new(&case.moments, how.damping, &cx).unwrap();
            prop_assert_eq!(whitening.damping(), how.damping);
            let white = whitening.apply(case.w.view(), &cx).unwrap();
            let sigma = singular_values(white.view()).unwrap();
            let gap = &case.w - &dense(&found);
            let error = squared(whitening.apply(gap.view(), &cx).unwrap().view());
            let (best, all) = (energy(&sigma[budget.rank..]), energy(&sigma));
            prop_assert!((error - best).abs() <= 1e-4 * best + 1e-6 * all, "{error} {best} {all}");
            // The damping counts for the rest.
            let plain = TruncatedSvd { svd: SvdMethod::Full };
            let plain = plain.decompose(case.w.view(), None, &budget, &cx).unwrap();
            let (ours, theirs) = (output_error(&case, &found), output_error(&case, &plain));
            prop_assert!(ours <= theirs * (1.0 + 1e-3) + 1e-5 * all, "{ours} {theirs}");
        }
    }

    #[test]
    fn all_lines_kept_or_full_rank_give_the_matrix_back(case in cases()) {
        for cx in contexts(1) {
            let (m, n) = case.w.dim();
            let all = RankBudget { rank: case.budget.rank, rows: case.structure.count((m, n)) };
            let full = RankBudget::rank(m.min(n));
            let structure = case.structure;
            let reference = LowRankSparse { structure, ..LowRankSparse::default() };
            let complement = Complement { structure, ..Complement::default() };
            let stages: [&dyn Decomposer; 2] = [&reference, &complement];
            for stage in stages {
                for budget in [all, full] {
                    for moments in [None, Some(&case.moments)] {
                        let found = stage.decompose(case.w.view(), moments, &budget, &cx).unwrap();
                        let gap = (&case.w - &dense(&found)).mapv(f32::abs);
                        // Whitening divides by the small singular values of the moments again.
                        let tolerance = if moments.is_some() { 1e-3 } else { 1e-5 };
                        prop_assert!(gap.iter().all(|&g| g <= tolerance), "{} {gap}", stage.name());
                    }
                }
            }
            let sparse = SparseOnly { structure, ..SparseOnly::default() };
            let found = sparse.decompose(case.w.view(), None, &RankBudget { rank: 0, ..all }, &cx);
            prop_assert_eq!(&dense(&found.unwrap()), &case.w);
        }
    }

    #[test]
    fn the_complement_is_never_worse_than_the_reference(case in cases()) {
        for cx in contexts(1) {
            let (structure, svd) = (case.structure, SvdMethod::Full);
            let complement = Complement { structure, svd, damping: 1e-9, ..Complement::default() };
            for score in [RowScore::Magnitude, RowScore::Energy] {
                let reference = LowRankSparse { structure, score, svd };
                for moments in [None, Some(&case.moments)] {
                    let run = |stage: &dyn Decomposer| {
                        stage.decompose(case.w.view(), moments, &case.budget, &cx).unwrap()
                    };
                    let (ours, theirs) = (run(&complement), run(&reference));
                    prop_assert!(ours.parameters() <= theirs.parameters());
                    prop_assert_eq!(ours.indices().len(), theirs.indices().len());
                    let error = if moments.is_some() { output_error } else { weight_error };
                    let (ours, theirs) = (error(&case, &ours), error(&case, &theirs));
                    let scale = if moments.is_some() {
                        squared(case.w.dot(&case.x.t()).view()) / case.x.nrows() as f64
                    } else {
                        squared(case.w.view())
                    };
                    prop_assert!(ours <= theirs * (1.0 + 1e-4) + 1e-6 * scale, "{ours} {theirs}");
                }
            }
        }
    }

    #[test]
    fn factors_act_as_the_matrix_that_they_multiply_to(case in cases()) {
        for cx in contexts(1) {
            let complement = Complement { structure: case.structure, ..Complement::default() };
            let found =
                complement.decompose(case.w.view(), None, &case.budget, &cx).unwrap();
            let y = found.forward(case.x.view(), &Cpu::new()).unwrap();
            let expected = case.x.dot(&dense(&found).t());
            let largest = expected.iter().fold(1.0f32, |l, x| l.max(x.abs()));
            prop_assert!((&y - &expected).iter().all(|e| e.abs() <= 1e-5 * largest));
            let most = case.budget.parameters(case.w.dim(), case.structure);
            prop_assert!(found.parameters() <= most);
        }
    }

    #[test]
    fn the_energy_rank_is_the_least_that_suffices(case in cases(), share in 0.01..1.0f64) {
        let spectrum = Spectrum::of(case.w.view(), None, 0.0, 1.0, &Context::cpu(1)).unwrap();
        let rank = by_energy(&spectrum.sigma, share).unwrap();
        let kept = |r: usize| spectrum.sigma[..r].iter().map(|s| s * s).sum::<f64>();
        let total = squared(case.w.view());
        prop_assert!(kept(rank) >= share * total * (1.0 - 1e-9));
        prop_assert!(rank == 0 || kept(rank - 1) < share * total * (1.0 + 1e-9));
        prop_assert!(by_ratio(case.w.dim(), share).unwrap() <= case.w.nrows().min(case.w.ncols()));
    }

    #[test]
    fn a_budget_is_met_to_less_than_one_rank(case in cases(), share in 0.3..1.0f64) {
        let spectra: Vec<_> = [1.0, 0.2, 3.0]
            .iter()
            .map(|&w| Spectrum::of(case.w.view(), None, 0.0, w, &Context::cpu(1)).unwrap())
            .collect();
        let (m, n) = case.w.dim();
        let target = (share * (3 * m * n) as f64) as usize;
        match allocate(&spectra, target, 0) {
            Err(error) => prop_assert!(false, "{error}"),
            Ok(chosen) => {
                let size: usize = chosen.iter().map(|a| a.parameters((m, n))).sum();
                let full = chosen.iter().all(|a| *a == Allocation::Dense);
                prop_assert!(size <= target && (full || target - size < m + n));
            }
        }
    }
}

#[test]
fn many_matrices_in_parallel_have_the_bits_of_one_by_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let weights: Vec<_> = (0..5).map(|_| matrix(160, 150, &mut rng)).collect();
    let budget = RankBudget { rank: 8, rows: 12 };
    let jobs: Vec<_> =
        weights.iter().map(|w| Job { weight: w.view(), moments: None, budget }).collect();
    let stage: Box<dyn Decomposer> = Box::new(Complement::default());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| decompose_all(&stage, &jobs, &Context::cpu(3))).unwrap()
    };
    let one = run(1);
    assert!(run(4) == one && run(2) == one);
    assert_eq!(one[0].parameters(), budget.parameters((160, 150), Structure::Rows));
}

/// Every decomposer, by a name for the message.
fn all() -> Vec<Box<dyn Decomposer>> {
    vec![
        Box::new(TruncatedSvd::default()),
        Box::new(Whitened::default()),
        Box::new(LowRankSparse::default()),
        Box::new(Complement::default()),
        Box::new(Complement { structure: Structure::Columns, ..Complement::default() }),
        Box::new(SparseOnly::default()),
    ]
}

fn run(
    stage: &dyn Decomposer,
    w: &Array2<f32>,
    moments: &Moments,
    budget: RankBudget,
    cx: &Context,
) -> Result<Factored> {
    stage.decompose(w.view(), Some(moments), &budget, cx)
}

#[test]
fn bad_input_is_a_typed_error_of_every_decomposer() {
    let w = matrix(6, 4, &mut ChaCha8Rng::seed_from_u64(9));
    let (fits, wide) = (Moments::new(Array2::eye(4), 9), Moments::new(Array2::eye(6), 9));
    let (fits, wide) = (fits.unwrap(), wide.unwrap());
    let mut nan = w.clone();
    nan[[2, 1]] = f32::NAN;
    for (stage, cx) in all().iter().flat_map(|s| contexts(1).into_iter().map(move |cx| (s, cx))) {
        let ok = match stage.name() {
            "sparse" => RankBudget { rank: 0, rows: 2 },
            _ => RankBudget::rank(2),
        };
        assert!(run(stage, &w, &fits, ok, &cx).is_ok(), "{}", stage.name());
        let neither = RankBudget::rank(0);
        let (deep, tall) = (RankBudget { rank: 5, rows: 1 }, RankBudget { rank: 1, rows: 7 });
        for budget in [neither, deep, tall] {
            let error = run(stage, &w, &fits, budget, &cx).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
        }
        let error = run(stage, &w, &wide, ok, &cx).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{error}");
        let error = run(stage, &nan, &fits, ok, &cx).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotFinite { .. }), "{error}");
    }
    let error = Whitened::default()
        .decompose(w.view(), None, &RankBudget::rank(1), &Context::cpu(1))
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
}

#[test]
fn zero_matrices_and_singular_moments_are_decomposed() {
    let x = matrix(2, 8, &mut ChaCha8Rng::seed_from_u64(9));
    let two_tokens = Moments::of(x.view(), &Cpu::new()).unwrap();
    let w = matrix(12, 8, &mut ChaCha8Rng::seed_from_u64(10));
    let zero = Array2::zeros((12, 8));
    for (stage, cx) in all().iter().flat_map(|s| contexts(1).into_iter().map(move |cx| (s, cx))) {
        let budget = match stage.name() {
            "sparse" => RankBudget { rank: 0, rows: 2 },
            "svd" | "whitened-svd" => RankBudget::rank(2),
            _ => RankBudget { rank: 2, rows: 2 },
        };
        let found = run(stage, &zero, &two_tokens, budget, &cx).unwrap();
        assert_eq!(dense(&found), zero, "{}", stage.name());
        run(stage, &w, &two_tokens, budget, &cx).unwrap();
    }
    // Inputs in two dimensions: rank 2 is enough for their outputs.
    let found =
        run(&Whitened::default(), &w, &two_tokens, RankBudget::rank(2), &Context::cpu(1)).unwrap();
    let error = squared((&w - &dense(&found)).dot(&x.t()).view());
    assert!(error <= 1e-4 * squared(w.dot(&x.t()).view()), "{error}");
}

/// Switch-base-32 in the paper's settings: eight experts on average in all sparse layers but the
/// encoder's first, rank 32 and a tenth of the rows in the experts that were merged.
#[test]
fn switch_base_32_has_the_published_sizes() {
    let (d, f, vocabulary, sparse, experts) = (768, 3072, 32_128, 12, 32);
    let (blocks, expert) = (12, 2 * d * f);
    let attention = 4 * d * d * (blocks + 2 * blocks);
    let norms = d * (2 * blocks + 3 * blocks + 2);
    let bias = 2 * 32 * 12; // Relative positions: 32 buckets, 12 heads, in each stack.
    let router = sparse * experts * d;
    let rest = vocabulary * d + attention + norms + bias + router + (2 * blocks - sparse) * expert;
    let millions = |x: usize| (x as f64 / 1e5).round() / 10.0;
    assert_eq!(millions(rest + sparse * experts * expert), 1978.5);
    let merged = (sparse - 1) * 8;
    assert_eq!(millions(rest + (experts + merged) * expert), 732.8);
    // All rows of all matrices compete for one threshold; here with scores that are all different.
    let shapes = [(f, d), (d, f)].repeat(merged);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let scores: Vec<Vec<f64>> =
        shapes.iter().map(|&(m, _)| (0..m).map(|_| rng.random()).collect()).collect();
    let lines: Vec<_> = scores
        .iter()
        .zip(&shapes)
        .map(|(scores, &(_, width))| ScoredRows { scores, width })
        .collect();
    let (kept, _) = surviving_rows(&lines, 0.1).unwrap();
    let matrix = |(&shape, kept): (&(usize, usize), &Vec<u32>)| {
        let ratio = 32.0 * (shape.0 + shape.1) as f64 / (shape.0 * shape.1) as f64;
        let budget = RankBudget { rank: by_ratio(shape, ratio).unwrap(), rows: kept.len() };
        budget.parameters(shape, Structure::Rows)
    };
    let compressed: usize = shapes.iter().zip(&kept).map(matrix).sum();
    assert_eq!(millions(rest + experts * expert + compressed), 380.7);
}
