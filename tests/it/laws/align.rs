//! Laws of alignment.

use crate::support::layers::{KINDS, World, expert, matrix, noisy, permutation, pool, world};
use mcsmoe::ErrorKind;
use mcsmoe::align::{
    ActivationMatching, Identity, Reference, WeightMatching, align_groups, align_layer,
};
use mcsmoe::linalg::Cpu;
use mcsmoe::model::{Expert, ExpertView, Grouping, Permutation, RoutingStats, SimilarityMatrix};
use mcsmoe::stage::{AlignPair, Aligner, Context, LayerView, Needs, Stage};
use ndarray::{Array2, ArrayView2, array};
use proptest::prelude::*;

fn cx() -> Context {
    Context::cpu(7)
}

fn align(
    aligner: &dyn Aligner,
    reference: &Expert,
    target: &Expert,
    inputs: ArrayView2<'_, f32>,
) -> Permutation {
    let (reference, target) = (reference.view(), target.view());
    let inputs = Some(inputs.reborrow());
    aligner.align(&AlignPair { reference, target, inputs }, &cx()).unwrap()
}

/// The largest difference of two outputs, relative to the largest output.
fn difference(a: &Expert, b: &Expert, x: ArrayView2<'_, f32>) -> f32 {
    let y = a.view().forward(x, &Cpu::new()).unwrap();
    let z = b.view().forward(x, &Cpu::new()).unwrap();
    let largest = |m: &Array2<f32>| m.iter().fold(1.0f32, |a, &b| a.max(b.abs()));
    largest(&y).recip() * (&y - &z).iter().fold(0.0f32, |a, &b| a.max(b.abs()))
}

/// `Σ_a C[a, p(a)]` by the definition, in f64.
fn objective(a: &ExpertView<'_>, b: &ExpertView<'_>, p: &Permutation) -> f64 {
    let dot = |x: Vec<f32>, y: Vec<f32>| -> f64 {
        x.iter().zip(y).map(|(&x, y)| f64::from(x) * f64::from(y)).sum()
    };
    let unit = |e: &ExpertView<'_>, u: usize| -> Vec<f32> {
        let input = [e.gate, Some(e.up)].into_iter().flatten();
        let rows = input.flat_map(|l| {
            l.weight.row(u).into_iter().copied().chain(l.bias.map(|b| b[u])).collect::<Vec<_>>()
        });
        rows.chain(e.down.weight.column(u).iter().copied()).collect()
    };
    let units = p.as_slice().iter().enumerate();
    units.map(|(u, &v)| dot(unit(a, u), unit(b, v as usize))).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_alignment_leaves_the_function_alone(
        d in 1usize..9, f in 1usize..20, t in 0usize..12, kind in 0usize..4, seed in 0u64..1000,
    ) {
        let (a, b) = (expert(KINDS[kind], d, f, seed), expert(KINDS[kind], d, f, seed + 1));
        let x = matrix(t, d, seed);
        let weights = WeightMatching::default();
        let aligners: [&dyn Aligner; 5] = [
            &Identity::default(),
            &weights,
            &WeightMatching { include_down: false, normalise: true, ..weights },
            &WeightMatching { tolerance: 1e-3, ..weights },
            &ActivationMatching::default(),
        ];
        for aligner in aligners {
            let p = align(aligner, &a, &b, x.view());
            let aligned = b.view().permuted(&p, &Cpu::new()).unwrap();
            // A permutation changes the order of a sum of f terms, nothing else.
            let tolerance = 4.0 * f as f32 * f32::EPSILON;
            prop_assert!(difference(&aligned, &b, matrix(5, d, 1).view()) <= tolerance);
        }
    }

    #[test]
    fn weight_matching_is_at_least_as_good_as_the_identity(
        d in 1usize..9, f in 1usize..30, kind in 0usize..4, seed in 0u64..1000,
    ) {
        let (a, b) = (expert(KINDS[kind], d, f, seed), expert(KINDS[kind], d, f, seed + 1));
        let p = align(&WeightMatching::default(), &a, &b, matrix(0, d, 0).view());
        let (best, plain) = (
            objective(&a.view(), &b.view(), &p),
            objective(&a.view(), &b.view(), &Permutation::identity(f)),
        );
        // The gain is f32, so the optimum is one up to the rounding of f of its entries.
        let rounding = f as f64 * (3 * d + 2) as f64 * 16.0 * f64::from(f32::EPSILON);
        prop_assert!(best >= plain - rounding, "{best} < {plain}");
    }
}

#[test]
fn planted_permutations_are_recovered_under_noise() {
    let (d, f) = (48, 96);
    let x = matrix(400, d, 5);
    for kind in KINDS {
        for share in [0.0, 0.1, 0.3] {
            let original = expert(kind, d, f, 11);
            let planted = permutation(f, 13);
            let scrambled = original.view().permuted(&planted, &Cpu::new()).unwrap();
            let target = noisy(&scrambled, share, 17);
            let weights = WeightMatching::default();
            let aligners: [&dyn Aligner; 4] = [
                &weights,
                &WeightMatching { include_down: false, ..weights },
                &WeightMatching { normalise: true, ..weights },
                &ActivationMatching::default(),
            ];
            for aligner in aligners {
                let p = align(aligner, &original, &target, x.view());
                let both = planted.then(&p).unwrap();
                let right = both.as_slice().iter().enumerate().filter(|(a, b)| *a == **b as usize);
                let right = right.count() as f64 / f as f64;
                assert!(right >= 0.99, "{aligner:?} {kind:?} noise {share}: {right}");
            }
        }
    }
}

#[test]
fn biases_decide_where_weights_are_equal() {
    let with = |bias: ndarray::Array1<f32>| {
        let up = mcsmoe::model::Linear { weight: array![[1.0], [1.0]], bias: Some(bias) };
        let act = mcsmoe::model::Activation::Relu;
        Expert::new(None, up, array![[1.0, 1.0]].into(), act).unwrap()
    };
    let (a, b) = (with(array![3.0, -2.0]), with(array![-2.0, 3.0]));
    let p = align(&WeightMatching::default(), &a, &b, matrix(0, 1, 0).view());
    assert_eq!(p.as_slice(), [1, 0]);
}

#[test]
fn norms_decide_who_decides() {
    // Up asks for the swap, down, a hundred times larger, for the identity.
    let a = Expert::relu(array![[1.0], [0.0]], array![[100.0, 0.0]]).unwrap();
    let b = Expert::relu(array![[0.0], [4.0]], array![[100.0, 1.0]]).unwrap();
    let x = matrix(0, 1, 0);
    let plain = WeightMatching::default();
    assert!(align(&plain, &a, &b, x.view()).is_identity());
    let only_up = WeightMatching { include_down: false, ..plain };
    assert_eq!(align(&only_up, &a, &b, x.view()).as_slice(), [1, 0]);
    let fair = WeightMatching { normalise: true, ..plain };
    assert_eq!(align(&fair, &a, &b, x.view()).as_slice(), [1, 0]);
}

#[test]
fn one_token_says_nothing_and_no_tokens_are_an_error() {
    let (a, b) = (expert(KINDS[2], 4, 6, 1), expert(KINDS[2], 4, 6, 2));
    let aligner = ActivationMatching::default();
    assert!(align(&aligner, &a, &b, matrix(1, 4, 3).view()).is_identity());
    let pair = AlignPair { reference: a.view(), target: b.view(), inputs: None };
    let error = aligner.align(&pair, &cx()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
}

#[test]
fn experts_of_two_kinds_and_bad_tolerances_are_refused() {
    let (a, b) = (expert(KINDS[0], 4, 6, 1), expert(KINDS[2], 4, 6, 2));
    let pair = AlignPair { reference: a.view(), target: b.view(), inputs: None };
    let aligners: [&dyn Aligner; 3] =
        [&Identity::default(), &WeightMatching::default(), &ActivationMatching::default()];
    for aligner in aligners {
        let error = aligner.align(&pair, &cx()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{error}");
    }
    let pair = AlignPair { reference: a.view(), target: a.view(), inputs: None };
    for tolerance in [-1.0, f64::NAN, f64::INFINITY] {
        let aligner = WeightMatching { tolerance, ..WeightMatching::default() };
        assert!(aligner.align(&pair, &cx()).is_err());
    }
}

fn scrambled_world() -> World {
    let original = expert(KINDS[3], 12, 40, 1);
    let copy = |i: u64| {
        let scrambled = original.view().permuted(&permutation(40, i), &Cpu::new()).unwrap();
        noisy(&scrambled, 0.1, i)
    };
    world((0..5).map(copy).collect(), 200, 9)
}

const ALL: [Reference; 4] =
    [Reference::FirstExpert, Reference::LowestIndex, Reference::Dominant, Reference::Medoid];

#[test]
fn a_layer_lines_up_at_any_number_of_threads() {
    let World { layer, stats } = scrambled_world();
    let view = LayerView::of(&layer, &stats);
    for reference in ALL {
        let aligners: [&dyn Aligner; 2] =
            [&WeightMatching::default(), &ActivationMatching::default()];
        for aligner in aligners {
            let run = |threads| {
                pool(threads).install(|| align_layer(aligner, reference, &view, &cx())).unwrap()
            };
            let found = run(1);
            assert!([2, 8].iter().all(|&threads| run(threads) == found));
            assert_eq!(found.iter().filter(|p| p.is_identity()).count(), 1, "{reference:?}");
            // All are copies of one expert: in one frame their weights agree but for the noise.
            let aligned: Vec<_> = layer.experts().iter().zip(&found).collect();
            let up = |i: usize| {
                let (e, p): (&Expert, &Permutation) = aligned[i];
                e.view().permuted(p, &Cpu::new()).unwrap().view().up.weight.to_owned()
            };
            let (x, y) = (up(0), up(4));
            let cosine = (&x * &y).sum() / ((&x * &x).sum() * (&y * &y).sum()).sqrt();
            assert!(cosine > 0.95, "{aligner:?} {reference:?}: {cosine}");
        }
    }
}

#[test]
fn each_reference_keeps_its_own_order() {
    let World { layer, stats } = scrambled_world();
    let view = LayerView::of(&layer, &stats);
    let members = [1, 2, 4];
    let labels = [Some(0), Some(1), Some(1), None, Some(1)];
    let grouping = Grouping::new(labels.to_vec(), vec![0, 4]).unwrap();
    let mut table = Array2::from_elem((5, 5), 0.1);
    (table[[1, 2]], table[[2, 1]], table[[2, 4]], table[[4, 2]]) = (0.9, 0.9, 0.8, 0.8);
    let table = SimilarityMatrix::from_similarities(table).unwrap();
    let run = |reference, table| {
        let aligner = WeightMatching::default();
        align_groups(&aligner, reference, &view, &grouping, table, &cx())
    };
    for (reference, keeps) in
        [(Reference::LowestIndex, 1), (Reference::Dominant, 4), (Reference::Medoid, 2)]
    {
        let found = run(reference, Some(&table)).unwrap();
        let identities: Vec<_> = members.into_iter().filter(|&i| found[i].is_identity()).collect();
        assert_eq!(identities, [keeps], "{reference:?}");
        assert!(found[0].is_identity() && found[3].is_identity(), "alone, or dropped");
    }
    // Expert 0 is not a member: all three move into its frame, as in a whole-layer alignment.
    let whole =
        align_layer(&WeightMatching::default(), Reference::FirstExpert, &view, &cx()).unwrap();
    let found = run(Reference::FirstExpert, None).unwrap();
    assert!(members.into_iter().all(|i| found[i] == whole[i]));
    let error = run(Reference::Medoid, None).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
}

#[test]
fn groups_of_one_are_left_alone_and_misfits_are_refused() {
    let World { layer, stats } = scrambled_world();
    let view = LayerView::of(&layer, &stats);
    let run = |grouping: Grouping| {
        let aligner = WeightMatching::default();
        align_groups(&aligner, Reference::FirstExpert, &view, &grouping, None, &cx())
    };
    assert!(run(Grouping::identity(5)).unwrap().iter().all(Permutation::is_identity));
    assert!(run(Grouping::identity(4)).is_err());
}

#[test]
fn missing_samples_and_failing_experts_are_named() {
    let World { layer, .. } = scrambled_world();
    let bare = RoutingStats::from_counts(vec![1; 5], 5);
    let view = LayerView::of(&layer, &bare);
    let aligner = ActivationMatching::default();
    assert!(aligner.needs().contains(Needs::SAMPLES));
    let error = align_layer(&aligner, Reference::Dominant, &view, &cx()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }), "{error}");
    let broken = WeightMatching { tolerance: -1.0, ..WeightMatching::default() };
    let error = align_layer(&broken, Reference::FirstExpert, &view, &cx()).unwrap_err();
    assert_eq!(error.place().expert, Some(1));
}

#[test]
fn recipes_spell_the_options_in_snake_case() {
    let reference: Reference = serde_json::from_str("\"lowest_index\"").unwrap();
    assert_eq!(reference, Reference::LowestIndex);
    let partial: WeightMatching = serde_json::from_str(r#"{"normalise": true}"#).unwrap();
    assert_eq!(partial, WeightMatching { normalise: true, ..WeightMatching::default() });
    assert!(serde_json::from_str::<WeightMatching>(r#"{"normalize": true}"#).is_err());
}
