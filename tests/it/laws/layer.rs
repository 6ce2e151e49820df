//! Laws that hold across rooms, on random layers in memory, through the public API.

use mcsmoe::align::{ActivationMatching, Identity, Reference, WeightMatching, align_groups};
use mcsmoe::group::{Agglomerative, KMeans, Linkage};
use mcsmoe::linalg::Cpu;
use mcsmoe::merge::router::{LogSumExpFit, MeanRow};
use mcsmoe::merge::{DominantOnly, Fisher, FixDominant, Weighted, Weighting, ZipIt};
use mcsmoe::model::{
    Activation, Budget, Expert, GroupScore, Grouping, LayerId, Linear, MergedLayer, MoeLayer,
    Numbering, Permutation, Router, RoutingGroups, RoutingRule, RoutingStats, Samples, Score,
    Target,
};
use mcsmoe::similarity::{
    ExpertOutputs, ExpertWeights, Feature, FeatureAbs, FeatureCorrelation, Gradients, Matching,
    MergedOutputError, OutputSource, Random, RouterLogits, RouterWeightFeature, RouterWeights,
    TokenOutputs, WeightFeature, WeightGradients,
};
use mcsmoe::stage::{
    Aligner, Context, Grouper, LayerSummary, LayerView, Members, Merger, RouterMerger, Similarity,
    Stage,
};
use ndarray::{Array1, Array2, ArrayView2};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Of the largest output: a function that must not change, computed in another order of additions.
const UNCHANGED: f32 = 1e-5;

fn config(cases: u32) -> Config {
    // Seeded, so that every run tries the same cases.
    Config { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(2310), ..Config::default() }
}

/// The shape of a random layer.
#[derive(Debug, Clone, Copy)]
struct Shape {
    n: usize,
    d: usize,
    f: usize,
    gated: bool,
    biased: bool,
}

fn shapes(experts: impl Strategy<Value = usize>) -> impl Strategy<Value = Shape> {
    (experts, 2..9usize, 1..14usize, any::<bool>(), any::<bool>())
        .prop_map(|(n, d, f, gated, biased)| Shape { n, d, f, gated, biased })
}

fn matrix(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, cols), || rng.random_range(-1.0..1.0))
}

fn expert(shape: Shape, rng: &mut ChaCha8Rng) -> Expert {
    let Shape { d, f, gated, biased, .. } = shape;
    let mut linear = |rows, cols| Linear {
        weight: matrix(rows, cols, rng),
        bias: biased.then(|| Array1::from_iter(matrix(1, rows, rng))),
    };
    let gate = gated.then(|| linear(f, d));
    let activation = if gated { Activation::Silu } else { Activation::Relu };
    Expert::new(gate, linear(f, d), linear(d, f), activation).unwrap()
}

fn permutation(n: usize, rng: &mut ChaCha8Rng) -> Permutation {
    let mut gather: Vec<u32> = (0..n as u32).collect();
    gather.shuffle(rng);
    Permutation::new(gather).unwrap()
}

fn layer(experts: Vec<Expert>, rule: RoutingRule, rng: &mut ChaCha8Rng) -> MoeLayer {
    let (n, d) = (experts.len(), experts[0].view().d_model());
    let correction = (rule.score == Score::Sigmoid).then(|| Array1::from_iter(matrix(1, n, rng)));
    let router = Router::new(matrix(n, d, rng) * 2.0, None, correction, rule).unwrap();
    MoeLayer::new(LayerId::causal(3), experts, router).unwrap()
}

/// Statistics as calibration would give them, samples included.
fn observe(layer: &MoeLayer, tokens: usize, rng: &mut ChaCha8Rng) -> RoutingStats {
    let inputs = matrix(tokens, layer.router().weight().ncols(), rng);
    let logits = layer.router().logits(inputs.view(), &Cpu::new()).unwrap();
    let routing = layer.router().route(logits.view()).unwrap();
    let mut counts = vec![0; layer.experts().len()];
    routing.experts.iter().for_each(|&e| counts[e as usize] += 1);
    let wide = logits.mapv(f64::from);
    RoutingStats {
        logit_gram: Some(wide.t().dot(&wide)),
        samples: Some(Samples { inputs, logits, routing, routed_output: None }),
        fisher: Some(layer.experts().iter().map(|e| positive(e, rng)).collect()),
        ..RoutingStats::from_counts(counts, tokens as u64)
    }
}

/// Something shaped like the expert with entries above 0.
fn positive(like: &Expert, rng: &mut ChaCha8Rng) -> Expert {
    let (gate, up, down) = like.clone().into_parts();
    let mut fill = |linear: Linear| Linear {
        weight: linear.weight.mapv(|_| rng.random_range(0.1..1.0)),
        bias: linear.bias.map(|bias| bias.mapv(|_| rng.random_range(0.1..1.0))),
    };
    let activation = like.view().activation;
    Expert::new(gate.map(&mut fill), fill(up), fill(down), activation).unwrap()
}

/// A random partition into `m` groups; the dominant expert is a random member.
fn partition(n: usize, m: usize, rng: &mut ChaCha8Rng) -> Grouping {
    let mut label: Vec<usize> =
        (0..n).map(|i| if i < m { i } else { rng.random_range(0..m) }).collect();
    label.shuffle(rng);
    let member = |g: usize, rng: &mut ChaCha8Rng| {
        let members: Vec<usize> = (0..n).filter(|&i| label[i] == g).collect();
        members[rng.random_range(0..members.len())]
    };
    let dominant = (0..m).map(|g| member(g, rng)).collect();
    Grouping::new(label.into_iter().map(Some).collect(), dominant).unwrap()
}

/// Aligns and merges every group.
fn merge(
    layer: &MoeLayer,
    stats: &RoutingStats,
    grouping: &Grouping,
    aligner: &dyn Aligner,
    reference: Reference,
    merger: &dyn Merger,
) -> MergedLayer {
    let cx = Context::cpu(7);
    let view = LayerView::of(layer, stats);
    let permutations = align_groups(aligner, reference, &view, grouping, None, &cx).unwrap();
    let one = |g: usize| {
        let indices = grouping.members(g);
        let dominant = indices.iter().position(|&i| i == grouping.dominants()[g]).unwrap();
        let experts: Vec<_> = indices.iter().map(|&i| layer.experts()[i].view()).collect();
        let chosen: Vec<_> = indices.iter().map(|&i| permutations[i].clone()).collect();
        let members = Members {
            layer: view,
            indices: &indices,
            dominant,
            experts: &experts,
            permutations: &chosen,
        };
        merger.merge(&members, &cx).unwrap()
    };
    let experts = (0..grouping.groups()).map(one).collect();
    let router = layer.router().clone();
    MergedLayer::new(layer.id(), experts, grouping.clone(), router, None).unwrap()
}

/// Mergers that give copies of one expert back as that expert, whatever the statistics.
fn averages() -> Vec<Box<dyn Merger>> {
    let by = [Weighting::Usage, Weighting::Uniform, Weighting::ReversedUsage, Weighting::Random];
    let weighted = by.map(|by| Box::new(Weighted::new(by)) as Box<dyn Merger>);
    let others: [Box<dyn Merger>; 2] = [Box::new(DominantOnly), Box::new(Fisher::default())];
    weighted.into_iter().chain(others).collect()
}

fn close(found: &Array2<f32>, expected: &Array2<f32>) {
    let largest = expected.iter().fold(0.0f32, |m, y| m.max(y.abs()));
    let error = (found - expected).iter().fold(0.0f32, |m, e| m.max(e.abs()));
    assert!(error <= UNCHANGED * largest, "off by {error}, largest output {largest}");
}

/// Policies of every kind, for `n` experts.
fn rules(n: usize) -> Vec<RoutingRule> {
    let k = 2.min(n);
    let soft = RoutingRule::softmax(k, false);
    let sigmoid = RoutingRule { score: Score::Sigmoid, renormalise: true, scale: 1.5, ..soft };
    let mut rules = vec![
        soft,
        RoutingRule::softmax(k, true),
        RoutingRule::softmax(n, true),
        RoutingRule { score: Score::SoftmaxOfTopK, ..soft },
        sigmoid,
    ];
    let groups = RoutingGroups { groups: 2, chosen: 1, score: GroupScore::TopTwoSum };
    if groups.misfit(n, k).is_none() {
        rules.push(RoutingRule { groups: Some(groups), ..sigmoid });
    }
    rules
}

/// Copies of `m` experts whose hidden units were shuffled, and the grouping that knows the copies.
fn shuffled_copies(shape: Shape, m: usize, rng: &mut ChaCha8Rng) -> (Vec<Expert>, Grouping) {
    let originals: Vec<Expert> = (0..m).map(|_| expert(shape, rng)).collect();
    let grouping = partition(shape.n, m, rng);
    let copy = |g: &Option<usize>| {
        let shuffle = permutation(shape.f, rng);
        originals[g.unwrap()].view().permuted(&shuffle, &Cpu::new()).unwrap()
    };
    let experts = grouping.labels().iter().map(copy).collect();
    (experts, grouping)
}

proptest! {
    #![proptest_config(config(48))]

    /// Aligning undoes what shuffling did: merging copies gives back the original function.
    #[test]
    fn shuffled_copies_merge_to_the_original(
        shape in shapes(2..7usize), m in 1..4usize, seed: u64,
        reference in prop::sample::select(&[
            Reference::FirstExpert, Reference::LowestIndex, Reference::Dominant,
        ][..]),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (experts, grouping) = shuffled_copies(shape, m.min(shape.n), &mut rng);
        let layer = layer(experts, RoutingRule::softmax(2, true), &mut rng);
        let stats = observe(&layer, 24, &mut rng);
        let aligner = WeightMatching::default();
        let x = matrix(40, shape.d, &mut rng);
        let expected = layer.routed_output(x.view(), &Cpu::new()).unwrap();
        for merger in averages() {
            let merged = merge(&layer, &stats, &grouping, &aligner, reference, &merger);
            close(&merged.mapped_output(x.view(), &Cpu::new()).unwrap(), &expected);
        }
    }

    /// Experts that differ only in the order of their hidden units say the same, whatever the
    /// weights look like: clusters by outputs are the copies, and merging them changes nothing.
    #[test]
    fn clusters_by_outputs_find_shuffled_copies(
        n in 2..9usize, m in 1..4usize, gated: bool, biased: bool, seed: u64,
    ) {
        let shape = Shape { n, d: 7, f: 12, gated, biased };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (experts, copies) = shuffled_copies(shape, m.min(n), &mut rng);
        let layer = layer(experts, RoutingRule::softmax(1, true), &mut rng);
        let stats = observe(&layer, 64, &mut rng);
        let (cx, view) = (Context::cpu(1), LayerView::of(&layer, &stats));
        let outputs = ExpertOutputs { source: OutputSource::All, ..ExpertOutputs::default() };
        let x = matrix(32, shape.d, &mut rng);
        let expected = layer.routed_output(x.view(), &Cpu::new()).unwrap();
        for grouper in clusterings() {
            let similarity = outputs.similarity(&view, &cx).unwrap();
            let (id, seen) = (layer.id(), stats.clone());
            let summary = LayerSummary { id, similarity, stats: seen, candidates: None };
            let budget = Budget::new(Target::PerLayer(copies.groups()));
            let found = grouper.group(&[summary], &budget, &cx).unwrap().remove(0);
            let partition = |g: &Grouping| g.renumbered(Numbering::ByFirstMember).labels().to_vec();
            prop_assert_eq!(partition(&found), partition(&copies), "{:?}", grouper);
            let aligner = WeightMatching::default();
            let (reference, merger) = (Reference::Dominant, Weighted::default());
            let merged = merge(&layer, &stats, &found, &aligner, reference, &merger);
            close(&merged.mapped_output(x.view(), &Cpu::new()).unwrap(), &expected);
        }
    }

    /// As many groups as experts: not a bit changes.
    #[test]
    fn merging_nothing_changes_nothing(shape in shapes(1..7usize), seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let experts = (0..shape.n).map(|_| expert(shape, &mut rng)).collect();
        let layer = layer(experts, RoutingRule::softmax(1, false), &mut rng);
        let stats = observe(&layer, 8, &mut rng);
        let grouping = Grouping::identity(shape.n);
        let aligner = WeightMatching::default();
        let merger = Weighted::default();
        let merged = merge(&layer, &stats, &grouping, &aligner, Reference::FirstExpert, &merger);
        prop_assert_eq!(&merged.experts, layer.experts());
        let x = matrix(16, shape.d, &mut rng);
        let expected = layer.routed_output(x.view(), &Cpu::new()).unwrap();
        prop_assert_eq!(merged.mapped_output(x.view(), &Cpu::new()).unwrap(), expected);
    }

    /// `Σ_g (Σ_{i ∈ S ∩ g} g_i) Ê_g` is what a layer of `n` copies computes, under any policy.
    #[test]
    fn redirected_tokens_see_the_copies(shape in shapes(1..9usize), m in 1..5usize, seed: u64) {
        for rule in rules(shape.n) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let grouping = partition(shape.n, m.min(shape.n), &mut rng);
            let experts: Vec<_> =
                (0..grouping.groups()).map(|_| expert(shape, &mut rng)).collect();
            let copies = grouping.labels().iter().map(|g| experts[g.unwrap()].clone()).collect();
            let copies = layer(copies, rule, &mut rng);
            let router = copies.router().clone();
            let merged = MergedLayer::new(copies.id(), experts, grouping, router, None).unwrap();
            let x = matrix(32, shape.d, &mut rng);
            let expected = copies.routed_output(x.view(), &Cpu::new()).unwrap();
            close(&merged.mapped_output(x.view(), &Cpu::new()).unwrap(), &expected);
        }
    }

    /// A dropped expert is gone: the rest computes what it would without that router row.
    #[test]
    fn dropped_experts_leave_the_others_as_if_alone(shape in shapes(3..9usize), seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kept = shape.n - 1;
        let gone = rng.random_range(0..shape.n);
        for rule in rules(shape.n).into_iter().filter(|r| r.groups.is_none() && r.top_k <= kept) {
            let all = (0..shape.n).map(|_| expert(shape, &mut rng)).collect();
            let layer = layer(all, rule, &mut rng);
            let keep: Vec<usize> = (0..shape.n).filter(|&i| i != gone).collect();
            let label = |i: usize| keep.iter().position(|&k| k == i);
            let grouping = Grouping::new((0..shape.n).map(label).collect(), keep.clone()).unwrap();
            let experts: Vec<_> = keep.iter().map(|&i| layer.experts()[i].clone()).collect();
            let router = layer.router().select(&keep, rule).unwrap();
            let alone = MoeLayer::new(layer.id(), experts.clone(), router).unwrap();
            let router = layer.router().clone();
            let merged = MergedLayer::new(layer.id(), experts, grouping, router, None).unwrap();
            let x = matrix(32, shape.d, &mut rng);
            let expected = alone.routed_output(x.view(), &Cpu::new()).unwrap();
            close(&merged.mapped_output(x.view(), &Cpu::new()).unwrap(), &expected);
        }
    }
}

fn clusterings() -> Vec<Box<dyn Grouper>> {
    let linkages = [Linkage::Average, Linkage::Single, Linkage::Complete, Linkage::Ward];
    let linked = |linkage| Agglomerative { linkage, ..Agglomerative::default() };
    let boxed = linkages.map(|l| Box::new(linked(l)) as Box<dyn Grouper>);
    boxed.into_iter().chain([Box::new(KMeans::default()) as Box<dyn Grouper>]).collect()
}

/// Activation matching finds shuffled copies too, where every unit fires on the samples.
#[test]
fn copies_that_fire_alike_are_found_by_their_activations() {
    let shape = Shape { n: 6, d: 8, f: 24, gated: true, biased: false };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (experts, grouping) = shuffled_copies(shape, 2, &mut rng);
    let layer = layer(experts, RoutingRule::softmax(2, true), &mut rng);
    let stats = observe(&layer, 256, &mut rng);
    let x = matrix(64, shape.d, &mut rng);
    let expected = layer.routed_output(x.view(), &Cpu::new()).unwrap();
    let output = |aligner: &dyn Aligner| {
        let merged =
            merge(&layer, &stats, &grouping, aligner, Reference::Dominant, &Weighted::default());
        merged.mapped_output(x.view(), &Cpu::new()).unwrap()
    };
    close(&output(&ActivationMatching::default()), &expected);
    // The law is not empty: without alignment the average is another function.
    let unaligned = output(&Identity::default());
    assert!((&unaligned - &expected).iter().any(|e| e.abs() > 0.1), "nothing was shuffled");
}

/// Every metric, aligner, merger and router gives the same bits at 1, 2 and 8 threads.
#[test]
fn the_number_of_threads_changes_no_bit() {
    let shape = Shape { n: 6, d: 48, f: 160, gated: true, biased: true };
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let experts = (0..shape.n).map(|_| expert(shape, &mut rng)).collect();
    let layer = layer(experts, RoutingRule::softmax(2, true), &mut rng);
    let stats = RoutingStats {
        gradients: Some((0..shape.n).map(|_| expert(shape, &mut rng)).collect()),
        ..observe(&layer, 1500, &mut rng)
    };
    let grouping = partition(shape.n, 3, &mut rng);
    let x = matrix(300, shape.d, &mut rng);
    let run = || {
        let cx = Context::cpu(7);
        let view = LayerView::of(&layer, &stats);
        let mut bits: Vec<(String, Vec<u64>)> = Vec::new();
        for metric in metrics() {
            let table = metric.similarity(&view, &cx).unwrap();
            let of = |t: ArrayView2<'_, f64>| t.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
            let both = [of(table.similarities()), of(table.distances())].concat();
            bits.push((metric.name().into(), both));
        }
        let aligners: [&dyn Aligner; 2] =
            [&WeightMatching::default(), &ActivationMatching::default()];
        for aligner in aligners {
            for merger in mergers() {
                let merged =
                    merge(&layer, &stats, &grouping, aligner, Reference::Dominant, &merger);
                let y = merged.mapped_output(x.view(), &Cpu::new()).unwrap();
                let name = format!("{} after {}", merger.name(), aligner.name());
                bits.push((name, y.iter().map(|y| y.to_bits().into()).collect()));
            }
        }
        let routers: [&dyn RouterMerger; 2] = [&MeanRow, &LogSumExpFit::default()];
        for router in routers {
            let narrowed = router.merge_router(&view, &grouping, &cx).unwrap();
            let rows = narrowed.weight().iter().map(|w| w.to_bits().into()).collect();
            bits.push((router.name().into(), rows));
        }
        bits
    };
    let at = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
    };
    let one = at(1);
    for threads in [2, 8] {
        for ((name, found), (_, expected)) in at(threads).iter().zip(&one) {
            assert!(found == expected, "{name} differs at {threads} threads");
        }
    }
}

fn mergers() -> Vec<Box<dyn Merger>> {
    let zips: [Box<dyn Merger>; 2] = [Box::new(ZipIt::default()), Box::new(FixDominant::default())];
    averages().into_iter().chain(zips).collect()
}

fn metrics() -> Vec<Box<dyn Similarity>> {
    let every = OutputSource::All;
    vec![
        Box::new(RouterLogits::default()),
        Box::new(RouterWeights::default()),
        Box::new(RouterWeightFeature::default()),
        Box::new(ExpertWeights::default()),
        Box::new(WeightFeature::default()),
        Box::new(Feature::default()),
        Box::new(FeatureAbs::default()),
        Box::new(ExpertOutputs { source: every, ..ExpertOutputs::default() }),
        Box::new(TokenOutputs::default()),
        Box::new(MergedOutputError::default()),
        Box::new(FeatureCorrelation { matching: Matching::Assignment }),
        Box::new(FeatureCorrelation { matching: Matching::Maximum }),
        Box::new(Gradients::default()),
        Box::new(WeightGradients::default()),
        Box::new(Random::default()),
    ]
}
