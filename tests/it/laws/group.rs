//! What every grouper promises, on random layers full of ties and unused experts.

use std::collections::BTreeSet;

use mcsmoe::ErrorKind;
use mcsmoe::group::{
    Absorb, Agglomerative, Dominant, KMeans, LayerScale, Linkage, Prune, RandomGroups,
    Representative, Spread, TaskSpecific, needs_of,
};
use mcsmoe::model::{
    Budget, Grouping, Importance, LayerId, Numbering, RoutingStats, SimilarityMatrix, Target,
};
use mcsmoe::stage::{Context, Grouper, LayerSummary, Needs, Stage};
use ndarray::Array2;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

/// Every method with every option that changes its course; whether it drops experts.
fn groupers() -> Vec<(Box<dyn Grouper>, bool)> {
    let mut all: Vec<(Box<dyn Grouper>, bool)> = Vec::new();
    for spread in [Spread::Global, Spread::Uniform] {
        for scale in [LayerScale::None, LayerScale::Max] {
            let importance = Importance::Reap;
            all.push((Box::new(Dominant { spread, scale, ..Dominant::default() }), false));
            for absorb in [Absorb::Drop, Absorb::Redirect] {
                let drops = absorb == Absorb::Drop;
                all.push((Box::new(Prune { importance, absorb, spread, scale }), drops));
            }
        }
        let linkages = [Linkage::Average, Linkage::Single, Linkage::Complete, Linkage::Ward];
        for linkage in linkages {
            let representative = Representative::Medoid;
            all.push((Box::new(Agglomerative { linkage, spread, representative }), false));
        }
        all.push((Box::new(TaskSpecific { beta: 0.7, spread }), true));
    }
    all.push((Box::new(KMeans { restarts: 2, ..KMeans::default() }), false));
    all.push((Box::new(RandomGroups::default()), false));
    all
}

fn layer(index: usize, n: usize) -> impl Strategy<Value = LayerSummary> {
    let table = prop::collection::vec(0u8..5, n * n);
    let counts = prop::collection::vec(select(vec![0u64, 0, 1, 1, 2, 5]), n);
    let reap = prop::collection::vec(select(vec![0.0, 0.5, 0.5, 2.0]), n);
    (table, counts, reap).prop_map(move |(table, counts, reap)| {
        let at = |i: usize, j: usize| f64::from(table[i.min(j) * n + i.max(j)]) / 8.0;
        let table = Array2::from_shape_fn((n, n), |(i, j)| if i == j { 1.0 } else { at(i, j) });
        let tokens = counts.iter().sum();
        LayerSummary {
            id: LayerId::causal(2 * index + 1),
            similarity: SimilarityMatrix::from_similarities(table).unwrap(),
            stats: RoutingStats { reap: Some(reap), ..RoutingStats::from_counts(counts, tokens) },
            candidates: None,
        }
    })
}

fn layers() -> impl Strategy<Value = Vec<LayerSummary>> {
    prop::collection::vec(1usize..9, 1..4).prop_flat_map(|sizes| {
        sizes.into_iter().enumerate().map(|(l, n)| layer(l, n)).collect::<Vec<_>>()
    })
}

fn budget(layers: &[LayerSummary]) -> impl Strategy<Value = Budget> + use<> {
    let sum: usize = layers.iter().map(LayerSummary::experts).sum();
    let target = prop_oneof![
        3 => (1..=sum + 1).prop_map(Target::Total),
        1 => (1usize..10).prop_map(Target::PerLayer),
    ];
    let protect = |l: &LayerSummary| {
        let (id, n) = (l.id, l.experts());
        subsequence((0..n).collect::<Vec<_>>(), 0..=n.min(2))
            .prop_map(move |of| (id, of.into_iter().collect::<BTreeSet<_>>()))
    };
    let protected: Vec<_> = layers.iter().map(protect).collect();
    let capacity = prop_oneof![2 => Just(None), 1 => (1usize..5).prop_map(Some)];
    (target, 1usize..3, capacity, protected).prop_map(
        |(target, min_per_layer, group_capacity, protected)| Budget {
            target,
            min_per_layer,
            group_capacity,
            protected: protected.into_iter().collect(),
        },
    )
}

/// The least number of groups of a layer, told again: by trying every number.
fn least(layer: &LayerSummary, budget: &Budget, drops: bool) -> Option<usize> {
    let (n, alone) = (layer.experts(), budget.protected_in(layer.id));
    let capacity = budget.group_capacity.unwrap_or(n);
    (budget.min_per_layer.max(1)..=n)
        .filter(|&m| m >= alone)
        .find(|&m| drops || (m - alone) * capacity >= n - alone)
}

fn reachable(layers: &[LayerSummary], budget: &Budget, drops: bool) -> bool {
    let least: Option<Vec<usize>> = layers.iter().map(|l| least(l, budget, drops)).collect();
    let Some(least) = least else { return false };
    match budget.target {
        Target::PerLayer(m) => {
            layers.iter().zip(&least).all(|(l, &low)| low <= m && m <= l.experts())
        }
        Target::Total(total) => {
            let most: usize = layers.iter().map(LayerSummary::experts).sum();
            least.iter().sum::<usize>() <= total && total <= most
        }
    }
}

fn check(layers: &[LayerSummary], budget: &Budget, groupings: &[Grouping], drops: bool) {
    assert_eq!(groupings.len(), layers.len());
    let counts: Vec<usize> = groupings.iter().map(Grouping::groups).collect();
    match budget.target {
        Target::PerLayer(m) => assert!(counts.iter().all(|&c| c == m), "{counts:?}"),
        Target::Total(total) => assert_eq!(counts.iter().sum::<usize>(), total),
    }
    for (layer, grouping) in layers.iter().zip(groupings) {
        assert_eq!(grouping.experts(), layer.experts());
        assert!(grouping.groups() >= budget.min_per_layer);
        assert_eq!(grouping, &grouping.renumbered(Numbering::ByDominant));
        let members: Vec<Vec<usize>> =
            (0..grouping.groups()).map(|g| grouping.members(g)).collect();
        let placed: usize = members.iter().map(Vec::len).sum();
        assert_eq!(placed, if drops { grouping.groups() } else { layer.experts() });
        for group in &members {
            let alone = group.iter().any(|&i| budget.is_protected(layer.id, i));
            assert!(!alone || group.len() == 1, "{group:?}");
            assert!(group.len() <= budget.group_capacity.unwrap_or(usize::MAX), "{group:?}");
        }
        let protected = budget.protected.get(&layer.id).into_iter().flatten();
        assert!(protected.into_iter().all(|&i| grouping.labels()[i].is_some()));
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn budgets_are_met_exactly_or_refused(
        (layers, budget) in layers().prop_flat_map(|l| { let b = budget(&l); (Just(l), b) }),
        seed: u64,
    ) {
        for (grouper, drops) in groupers() {
            match grouper.group(&layers, &budget, &Context::cpu(seed)) {
                Ok(groupings) => check(&layers, &budget, &groupings, drops),
                Err(error) => {
                    let budget_error = matches!(error.kind(), ErrorKind::Budget { .. });
                    prop_assert!(budget_error, "{grouper:?}: {error}");
                    prop_assert!(!reachable(&layers, &budget, drops), "{grouper:?}: {error}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn groupings_do_not_depend_on_the_number_of_threads(
        (layers, budget) in layers().prop_flat_map(|l| { let b = budget(&l); (Just(l), b) }),
    ) {
        let at = |threads: usize| {
            let group = |g: &dyn Grouper| g.group(&layers, &budget, &Context::cpu(7)).ok();
            pool(threads).install(|| groupers().iter().map(|(g, _)| group(g)).collect::<Vec<_>>())
        };
        let one = at(1);
        prop_assert!([2, 8].into_iter().all(|t| at(t) == one));
    }

    #[test]
    fn layers_of_known_counts_can_be_decided_one_by_one(
        (layers, budget) in layers().prop_flat_map(|l| { let b = budget(&l); (Just(l), b) }),
        seed: u64,
    ) {
        let (sizes, cx): (Vec<_>, _) =
            (layers.iter().map(|l| (l.id, l.experts())).collect(), Context::cpu(seed));
        for (grouper, _) in groupers() {
            let together = grouper.group(&layers, &budget, &cx);
            let Ok(Some(counts)) = grouper.counts(&sizes, &budget) else {
                let global = matches!(budget.target, Target::Total(_));
                prop_assert!(global || together.is_err(), "{grouper:?}");
                continue;
            };
            let together = together.unwrap();
            for ((layer, count), expected) in layers.iter().zip(counts).zip(together) {
                let budget = Budget { target: Target::PerLayer(count), ..budget.clone() };
                let alone = grouper.group(std::slice::from_ref(layer), &budget, &cx).unwrap();
                prop_assert_eq!(&alone, &[expected], "{:?}", grouper);
            }
        }
    }

    #[test]
    fn dominant_experts_are_the_best_and_attract_the_most_similar(
        layers in layers(), m in 1usize..4,
    ) {
        let m = layers.iter().map(LayerSummary::experts).min().unwrap().min(m);
        let budget = Budget::new(Target::PerLayer(m));
        let groupings = Dominant::default().group(&layers, &budget, &Context::cpu(0)).unwrap();
        for (layer, grouping) in layers.iter().zip(&groupings) {
            let usage = layer.stats.usage();
            let similarity = layer.similarity.similarities();
            let kept = grouping.dominants();
            for i in (0..layer.experts()).filter(|i| !kept.contains(i)) {
                for &d in kept {
                    prop_assert!(usage[d] > usage[i] || (usage[d] == usage[i] && d < i));
                    let own = kept[grouping.labels()[i].unwrap()];
                    prop_assert!(similarity[[i, own]] >= similarity[[i, d]]);
                }
            }
        }
    }
}

#[test]
fn a_global_budget_favours_balanced_layers() {
    let of = |index, counts: [u64; 4]| LayerSummary {
        id: LayerId::causal(index),
        similarity: SimilarityMatrix::from_similarities(Array2::eye(4)).unwrap(),
        stats: RoutingStats::from_counts(counts.to_vec(), counts.iter().sum()),
        candidates: None,
    };
    let layers = [of(0, [97, 1, 1, 1]), of(1, [25, 25, 25, 25])];
    let budget = Budget::new(Target::Total(5));
    let counts = |grouper: &dyn Grouper| -> Vec<usize> {
        let groupings = grouper.group(&layers, &budget, &Context::cpu(0)).unwrap();
        groupings.iter().map(Grouping::groups).collect()
    };
    assert_eq!(counts(&Dominant::default()), [1, 4]);
    assert_eq!(counts(&Dominant { spread: Spread::Uniform, ..Dominant::default() }), [3, 2]);
    assert_eq!(counts(&TaskSpecific { spread: Spread::Global, ..Default::default() }), [1, 4]);
}

#[test]
fn the_scale_decides_how_layers_compare() {
    let of = |index, counts: &[u64]| LayerSummary {
        id: LayerId::causal(index),
        similarity: SimilarityMatrix::from_similarities(Array2::eye(counts.len())).unwrap(),
        stats: RoutingStats::from_counts(counts.to_vec(), counts.iter().sum()),
        candidates: None,
    };
    // Usage 0.5, 0.3, 0.2 and 0.25 each: the second expert of layer 0 is used more, but less of
    // its layer's best.
    let layers = [of(0, &[5, 3, 2]), of(1, &[1; 4])];
    let counts = |scale| -> Vec<usize> {
        let grouper = Dominant { scale, ..Dominant::default() };
        let budget = Budget::new(Target::Total(3));
        let groupings = grouper.group(&layers, &budget, &Context::cpu(0)).unwrap();
        groupings.iter().map(Grouping::groups).collect()
    };
    assert_eq!(counts(LayerScale::None), [2, 1]);
    assert_eq!(counts(LayerScale::Max), [1, 2]);
}

#[test]
fn globally_cheapest_merges_are_relative_to_the_layer() {
    let of = |index, near: f64, far: f64| {
        let points: [f64; 3] = [0.0, near, far];
        let distance = Array2::from_shape_fn((3, 3), |(i, j)| (points[i] - points[j]).abs());
        LayerSummary {
            id: LayerId::causal(index),
            similarity: SimilarityMatrix::from_distances(distance).unwrap(),
            stats: RoutingStats::from_counts(vec![1, 2, 3], 6),
            candidates: None,
        }
    };
    // The pair of layer 0 is closer, but that of layer 1 is much closer for its layer.
    let layers = [of(0, 0.9, 2.0), of(1, 10.0, 1000.0)];
    let grouper = Agglomerative { spread: Spread::Global, ..Agglomerative::default() };
    let budget = Budget::new(Target::Total(5));
    let groupings = grouper.group(&layers, &budget, &Context::cpu(0)).unwrap();
    assert!(groupings[0].is_identity());
    assert_eq!(groupings[1].labels(), [Some(0), Some(0), Some(1)]);
    assert_eq!(groupings[1].dominants(), [1, 2]);
}

#[test]
fn stages_ask_for_the_statistics_of_their_score() {
    assert_eq!(Dominant::default().needs(), Needs::NONE);
    assert_eq!(Prune::default().needs(), Needs::REAP);
    let needs = [
        (Importance::Frequency, Needs::NONE),
        (Importance::RouterMass, Needs::ROUTER_MASS),
        (Importance::OutputNorm, Needs::OUTPUT_NORM),
        (Importance::Reap, Needs::REAP),
    ];
    for (importance, expected) in needs {
        assert_eq!(needs_of(importance), expected);
        assert_eq!(Prune { importance, ..Prune::default() }.needs(), expected);
    }
    let bare = LayerSummary {
        id: LayerId::causal(0),
        similarity: SimilarityMatrix::from_similarities(Array2::eye(2)).unwrap(),
        stats: RoutingStats::from_counts(vec![1, 1], 2),
        candidates: None,
    };
    let budget = Budget::new(Target::PerLayer(1));
    let failure = Prune::default().group(&[bare], &budget, &Context::cpu(0)).unwrap_err();
    assert!(matches!(failure.kind(), ErrorKind::Missing { .. }));
}

#[test]
fn options_read_from_recipes_with_defaults() {
    let read: Dominant = serde_json::from_str(r#"{"scale": "max"}"#).unwrap();
    assert_eq!(read, Dominant { scale: LayerScale::Max, ..Dominant::default() });
    let read: Agglomerative = serde_json::from_str(r#"{"linkage": "ward"}"#).unwrap();
    assert_eq!(read.linkage, Linkage::Ward);
    assert!(serde_json::from_str::<Prune>(r#"{"importanse": "reap"}"#).is_err());
}

#[test]
fn seeds_choose_random_groups() {
    let n = 16;
    let layers = [LayerSummary {
        id: LayerId::causal(0),
        similarity: SimilarityMatrix::from_similarities(Array2::eye(n)).unwrap(),
        stats: RoutingStats::from_counts(vec![1; n], 16),
        candidates: None,
    }];
    let budget = Budget::new(Target::PerLayer(4));
    let of = |seed| RandomGroups::default().group(&layers, &budget, &Context::cpu(seed)).unwrap();
    assert_eq!(of(3), of(3));
    assert_ne!(of(3), of(4));
}
