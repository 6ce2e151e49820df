//! Removals are measured: their errors are those of the layers that they describe.

use crate::support::layers;
use crate::support::layers::{KINDS, World, expert, matrix, pool, world};
use mcsmoe::ErrorKind;
use mcsmoe::group::{Removal, Rest, Spread};
use mcsmoe::linalg::Cpu;
use mcsmoe::model::{
    Budget, Expert, Grouping, LayerId, MergedLayer, RoutingStats, SimilarityMatrix, Target,
};
use mcsmoe::recover::LeastSquares;
use mcsmoe::stage::{
    Candidate, Context, Grouper, LayerSummary, LayerView, Recoverer, Recovery, Stage,
};
use ndarray::{Array2, Axis};

const T: usize = 200;

fn small(n: usize, seed: u64) -> World {
    // The last are wide: fewer tokens than features.
    let (kind, f) = (KINDS[seed as usize % KINDS.len()], if seed == 3 { 50 } else { 6 });
    world((0..n as u64).map(|i| expert(kind, 8, f, 31 * seed + i)).collect(), T, seed)
}

/// Similarities without a tie.
fn table(n: usize, seed: u64) -> SimilarityMatrix {
    let noise = matrix(n, n, seed + 9);
    let at = |i: usize, j: usize| 0.5 + 0.05 * f64::from(noise[[i.min(j), i.max(j)]]).tanh();
    let full = |(i, j)| if i == j { 1.0 } else { at(i, j) };
    SimilarityMatrix::from_similarities(Array2::from_shape_fn((n, n), full)).unwrap()
}

fn survey(method: &Removal, world: &World, budget: &Budget) -> Vec<Candidate> {
    let view = LayerView::of(&world.layer, &world.stats);
    let table = table(world.layer.experts().len(), 5);
    method.survey(&view, &table, budget, &Context::cpu(0)).unwrap()
}

fn budget() -> Budget {
    Budget::new(Target::PerLayer(1))
}

fn raw(rest: Rest) -> Removal {
    Removal { rest, refit: false, ..Removal::default() }
}

/// The layer with its dominant experts as they are.
fn merged(world: &World, grouping: &Grouping) -> MergedLayer {
    let experts: Vec<Expert> =
        grouping.dominants().iter().map(|&d| world.layer.experts()[d].clone()).collect();
    let router = world.layer.router().clone();
    MergedLayer::new(world.layer.id(), experts, grouping.clone(), router, None).unwrap()
}

/// Inputs and targets, the rows that judge behind the others.
fn judged(world: &World) -> (Array2<f32>, Array2<f32>, usize) {
    let inputs = &world.stats.samples.as_ref().unwrap().inputs;
    let (fit, judge): (Vec<usize>, Vec<usize>) = (0..T).partition(|t| t % 5 != 4);
    let x = inputs.select(Axis(0), &[fit, judge.clone()].concat());
    let targets = world.layer.routed_output(x.view(), &Cpu::new()).unwrap();
    (x, targets, judge.len())
}

#[test]
fn errors_are_those_of_the_layer_that_is_left() {
    for seed in 0..4 {
        let world = small(6, seed);
        let (x, targets, held_out) = judged(&world);
        let (inputs, targets) = (x.view(), targets.view());
        let judged = Recovery { inputs, targets, narrowed: false, held_out };
        let (all, cx) = (Recovery { held_out: 0, ..judged }, Context::cpu(0));
        for rest in [Rest::Drop, Rest::Redirect, Rest::Best] {
            let greedy = Removal { exhaustive: 0, ..raw(rest) };
            for method in [raw(rest), greedy, Removal { rest, ..Removal::default() }] {
                let found = survey(&method, &world, &budget());
                let sizes: Vec<usize> = found.iter().map(|c| c.grouping.groups()).collect();
                assert_eq!(sizes, [1, 2, 3, 4, 5, 6], "{method:?}");
                assert!(found[5].grouping.is_identity() && found[5].error == 0.0);
                for Candidate { grouping, error } in &found[..5] {
                    assert_eq!(grouping.labels().contains(&None), {
                        let dropped = grouping.labels().iter().filter(|l| l.is_none()).count();
                        assert!(rest != Rest::Redirect || dropped == 0);
                        assert!(rest != Rest::Drop || dropped == 6 - grouping.groups());
                        dropped > 0
                    });
                    let layer = merged(&world, grouping);
                    let expected = if method.refit {
                        let ridges = vec![method.ridge];
                        let fit = LeastSquares { ridges, ..LeastSquares::default() };
                        let fitted = fit.recover(&judged, layer.clone(), &cx).unwrap();
                        // A fit that does not help is not kept there, and told here.
                        let kept = judged.error(&layer, &cx).unwrap();
                        let after = judged.error(&fitted, &cx).unwrap();
                        if after < kept { after } else { *error }
                    } else {
                        all.error(&layer, &cx).unwrap()
                    };
                    let gap = (error - expected).abs();
                    assert!(gap < 1e-4 * expected, "{error} for {expected}: {method:?}");
                }
            }
        }
    }
}

#[test]
fn trying_all_subsets_is_never_worse_than_one_at_a_time() {
    let mut better = 0;
    for seed in 0..8 {
        let world = small(7, seed);
        let all = survey(&raw(Rest::Drop), &world, &budget());
        let greedy = survey(&Removal { exhaustive: 0, ..raw(Rest::Drop) }, &world, &budget());
        let best = survey(&Removal { targets: 9, ..raw(Rest::Best) }, &world, &budget());
        for ((a, g), b) in all.iter().zip(&greedy).zip(&best).rev() {
            // The same sums in f32, in another order.
            assert!(a.error <= g.error * (1.0 + 1e-6), "{} > {}", a.error, g.error);
            better += usize::from(a.grouping != g.grouping);
            if a.grouping.groups() == 6 {
                assert_eq!(a.grouping, g.grouping);
                assert!(b.error <= g.error * (1.0 + 1e-6));
            }
        }
    }
    assert!(better > 0, "greedy was always right: nothing was compared");
}

#[test]
fn copies_go_first_and_cost_nothing() {
    // Experts 4 and 5 are copies of 0 and 1: a redirect changes nothing. An expert that gives what
    // the router's rest would give has no such luck: dropping renormalises.
    let base = small(4, 1);
    let mut experts = base.layer.experts().to_vec();
    experts.extend([experts[0].clone(), experts[1].clone()]);
    let world = world(experts, T, 3);
    for refit in [false, true] {
        let method = Removal { rest: Rest::Redirect, refit, targets: 9, ..Removal::default() };
        let found = survey(&method, &world, &budget());
        let four = found.iter().find(|c| c.grouping.groups() == 4).unwrap();
        let labels = four.grouping.labels();
        assert!(four.error < 1e-10, "{}", four.error);
        assert_eq!((labels[0], labels[1]), (labels[4], labels[5]));
    }
}

#[test]
fn protected_experts_stay_alone_and_groups_have_room() {
    let mut world = small(6, 2);
    let mut experts = world.layer.experts().to_vec();
    let (gate, up, mut down) = experts[3].clone().into_parts();
    let activation = experts[3].view().activation;
    down.weight *= 50.0;
    experts[3] = Expert::new(gate, up, down, activation).unwrap();
    world = layers::world(experts, T, 2);
    let id = world.layer.id();
    let mut budget = budget();
    budget.protected.insert(id, [1].into());
    budget.group_capacity = Some(3);
    for rest in [Rest::Drop, Rest::Redirect, Rest::Best] {
        for refit in [false, true] {
            let protect_super = Some(8.0);
            let method = Removal { rest, refit, protect_super, ..Removal::default() };
            let found = survey(&method, &world, &budget);
            assert!(found[0].grouping.groups() >= 2);
            for Candidate { grouping, .. } in &found {
                for alone in [1, 3] {
                    let g = grouping.labels()[alone].expect("kept");
                    assert_eq!(grouping.members(g), [alone]);
                }
                assert!((0..grouping.groups()).all(|g| grouping.members(g).len() <= 3));
            }
            let plain = survey(&Removal { protect_super: None, ..method }, &world, &budget);
            assert!(
                plain[0].grouping.groups() < found[0].grouping.groups() || rest == Rest::Redirect
            );
        }
    }
}

#[test]
fn the_budget_is_met_and_the_bits_do_not_depend_on_threads() {
    let summary = |index: usize, method: &Removal| {
        let world = small(6, index as u64);
        let similarity = table(6, 5);
        let stats = RoutingStats { samples: None, ..world.stats.clone() };
        let candidates = Some(survey(method, &world, &budget()));
        LayerSummary { id: LayerId::causal(index), similarity, stats, candidates }
    };
    for refit in [false, true] {
        let method = Removal { refit, spread: Spread::Global, ..Removal::default() };
        let run = |threads| {
            pool(threads).install(|| {
                let layers: Vec<_> = (0..3).map(|l| summary(l, &method)).collect();
                let budget = Budget::new(Target::Total(8));
                let found = method.group(&layers, &budget, &Context::cpu(0)).unwrap();
                let errors: Vec<u64> = layers
                    .iter()
                    .flat_map(|l| l.candidates.as_ref().unwrap().iter().map(|c| c.error.to_bits()))
                    .collect();
                (found, errors)
            })
        };
        let (found, errors) = run(1);
        assert_eq!(found.iter().map(Grouping::groups).sum::<usize>(), 8);
        assert_eq!((found, errors), run(3));
    }
}

#[test]
fn wide_outputs_are_measured_on_fewer_features_and_misuse_is_refused() {
    let world = small(6, 3);
    let full = survey(&raw(Rest::Drop), &world, &budget());
    let narrow = survey(&Removal { width: 4, ..raw(Rest::Drop) }, &world, &budget());
    for (a, b) in full.iter().zip(&narrow).take(5) {
        assert!(b.error > 0.3 * a.error && b.error < 3.0 * a.error, "{} {}", a.error, b.error);
    }
    let view = LayerView::of(&world.layer, &world.stats);
    let bare = RoutingStats { samples: None, ..world.stats.clone() };
    let of = |method: Removal, view: &LayerView<'_>| {
        method.survey(view, &table(6, 5), &budget(), &Context::cpu(0)).unwrap_err()
    };
    for bad in [
        Removal { ridge: 0.0, ..Removal::default() },
        Removal { protect_super: Some(0.5), ..Removal::default() },
    ] {
        assert!(matches!(of(bad, &view).kind(), ErrorKind::OutOfRange { .. }));
    }
    let missing = of(Removal::default(), &LayerView::of(&world.layer, &bare));
    assert!(matches!(missing.kind(), ErrorKind::Missing { .. }), "{missing}");
    assert!(Removal::default().needs().contains(mcsmoe::stage::Needs::SAMPLES));
}
