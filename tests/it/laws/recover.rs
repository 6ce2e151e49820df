//! Laws that every recoverer keeps, and what each recovers exactly.

use crate::support::numbers::Numbers;
use mcsmoe::ErrorKind;
use mcsmoe::model::{
    Activation, Expert, GroupScore, Grouping, LayerId, MergedLayer, Router, RoutingGroups,
    RoutingRule, Score,
};
use mcsmoe::recover::{
    Distill, HiddenLoss, KnowledgeDistillation, LeastSquares, Per, Scale, Sequence, UnitScale,
};
use mcsmoe::stage::{Context, Recoverer, Recovery};
use ndarray::{Array1, Array2, s};

const D: usize = 12;
const F: usize = 10;

fn expert(numbers: &mut Numbers, activation: Activation) -> Expert {
    let (gate, up, down) = (numbers.linear(F, D), numbers.linear(F, D), numbers.linear(D, F));
    Expert::new(Some(gate), up, down, activation).unwrap()
}

/// Seven experts in four groups; one is dropped, one is alone.
fn grouping() -> Grouping {
    let label = vec![Some(0), Some(1), Some(0), None, Some(2), Some(3), Some(1), Some(2)];
    Grouping::new(label, vec![0, 1, 4, 5]).unwrap()
}

fn sigmoid_rule() -> RoutingRule {
    let groups = Some(RoutingGroups { groups: 2, chosen: 1, score: GroupScore::TopTwoSum });
    RoutingRule { score: Score::Sigmoid, top_k: 2, renormalise: true, scale: 1.5, groups }
}

fn layer(seed: u64, rule: RoutingRule) -> MergedLayer {
    let mut numbers = Numbers(seed);
    let grouping = grouping();
    let experts = (0..grouping.groups()).map(|_| expert(&mut numbers, Activation::Silu)).collect();
    let mut router = |rows: usize| {
        let weight = numbers.matrix(rows, D);
        let bias = Array1::from_shape_simple_fn(rows, || 0.1 * numbers.next());
        let correction = Array1::from_shape_simple_fn(rows, || 0.1 * numbers.next());
        Router::new(weight, Some(bias), Some(correction), rule).unwrap()
    };
    let (wide, narrow) = (router(grouping.experts()), router(grouping.groups()));
    MergedLayer::new(LayerId::causal(3), experts, grouping, wide, Some(narrow)).unwrap()
}

/// The layer with noise on its down projections, or on everything but the routers' policy.
fn perturbed(layer: &MergedLayer, seed: u64, by: f32, down_only: bool) -> MergedLayer {
    let mut numbers = Numbers(seed);
    let mut noisy = layer.clone();
    for expert in &mut noisy.experts {
        let activation = expert.view().activation;
        let (mut gate, mut up, mut down) = expert.clone().into_parts();
        down.weight.mapv_inplace(|x| x + by * numbers.next());
        if !down_only {
            up.weight.mapv_inplace(|x| x + by * numbers.next());
            let gate = gate.iter_mut().map(|gate| &mut gate.weight);
            gate.for_each(|gate| gate.mapv_inplace(|x| x + by * numbers.next()));
        }
        *expert = Expert::new(gate, up, down, activation).unwrap();
    }
    noisy
}

fn output(layer: &MergedLayer, x: &Array2<f32>, narrowed: bool) -> Array2<f32> {
    let cpu = mcsmoe::linalg::Cpu::new();
    match narrowed {
        true => layer.narrowed_output(x.view(), &cpu).unwrap().unwrap(),
        false => layer.mapped_output(x.view(), &cpu).unwrap(),
    }
}

fn rules() -> [RoutingRule; 3] {
    [RoutingRule::softmax(2, true), RoutingRule::softmax(3, false), sigmoid_rule()]
}

fn with<'a>(
    x: &'a Array2<f32>,
    targets: &'a Array2<f32>,
    narrowed: bool,
    held_out: usize,
) -> Recovery<'a> {
    Recovery { inputs: x.view(), targets: targets.view(), narrowed, held_out }
}

/// The solvers of the same equations: by features, by block Gauss–Seidel, by tokens.
fn solvers(ridge: f64) -> [LeastSquares; 3] {
    let features = LeastSquares { ridges: vec![ridge], token_limit: 0, ..LeastSquares::default() };
    let iterative =
        LeastSquares { dense_limit: 0, iterations: 200, tolerance: 0.0, ..features.clone() };
    let tokens = LeastSquares { dense_limit: 0, token_limit: 8192, ..features.clone() };
    [features, iterative, tokens]
}

#[test]
fn least_squares_restores_planted_down_projections() {
    let x = Numbers(5).matrix(900, D);
    for (rule, narrowed) in rules().into_iter().flat_map(|r| [(r, true), (r, false)]) {
        let truth = layer(1, rule);
        let targets = output(&truth, &x, narrowed);
        let task = with(&x, &targets, narrowed, 100);
        let start = perturbed(&truth, 2, 0.3, true);
        let cx = Context::cpu(0);
        assert!(task.error(&start, &cx).unwrap() > 1e-2);
        for (solver, tolerance) in solvers(1e-7).into_iter().zip([1e-3, 1e-2, 1e-2]) {
            let found = solver.recover(&task, start.clone(), &cx).unwrap();
            assert!(task.error(&found, &cx).unwrap() < 1e-7);
            for (a, b) in found.experts.iter().zip(&truth.experts) {
                let gap = &a.view().down.weight - &b.view().down.weight;
                let worst = gap.iter().fold(0.0f32, |m, g| m.max(g.abs()));
                assert!(worst < tolerance, "{worst}: {rule:?}, narrowed {narrowed}");
                assert_eq!(a.view().up.weight, b.view().up.weight);
            }
        }
    }
}

#[test]
fn the_solvers_agree() {
    let (x, noise) = (Numbers(7).matrix(400, D), Numbers(8).matrix(400, D));
    let truth = layer(3, RoutingRule::softmax(2, true));
    let targets = output(&truth, &x, false) + 0.2 * noise;
    let task = with(&x, &targets, false, 50);
    let start = perturbed(&truth, 4, 0.5, false);
    for ridge in [1e-3, 1e-2, 1.0] {
        let found = solvers(ridge)
            .map(|solver| solver.recover(&task, start.clone(), &Context::cpu(0)).unwrap());
        assert_ne!(found[0], start);
        // What no feature explains is divided by the ridge in the form of tokens, in f32 at last.
        let by_tokens = (4.0 * f32::EPSILON / ridge as f32).max(1e-4);
        for (other, tolerance) in found[1..].iter().zip([1e-4, by_tokens]) {
            for (a, b) in found[0].experts.iter().zip(&other.experts) {
                let (a, b) = (a.view().down.weight, b.view().down.weight);
                approx::assert_abs_diff_eq!(a, b, epsilon = tolerance);
            }
        }
    }
}

/// Sixteen wide experts of two a token.
fn wide_layer(d: usize, f: usize) -> MergedLayer {
    let mut numbers = Numbers(31);
    let one = |numbers: &mut Numbers| {
        let (gate, up, down) = (numbers.matrix(f, d), numbers.matrix(f, d), numbers.matrix(d, f));
        Expert::swiglu(gate, up, down).unwrap()
    };
    let experts = (0..16).map(|_| one(&mut numbers)).collect();
    let rule = RoutingRule::softmax(2, true);
    let router = Router::new(numbers.matrix(16, d), None, None, rule).unwrap();
    let (id, grouping) = (LayerId::causal(0), Grouping::identity(16));
    MergedLayer::new(id, experts, grouping, router, None).unwrap()
}

/// The layer without the second half of its experts.
fn halved(layer: &MergedLayer) -> MergedLayer {
    let kept = layer.experts.len() / 2;
    let label = (0..layer.experts.len()).map(|e| (e < kept).then_some(e)).collect();
    let grouping = Grouping::new(label, (0..kept).collect()).unwrap();
    let (experts, router) = (layer.experts[..kept].to_vec(), layer.router.clone());
    MergedLayer::new(layer.id, experts, grouping, router, None).unwrap()
}

#[test]
fn five_passes_of_block_gauss_seidel_are_near_the_exact_fit_and_eight_are_there() {
    let (d, f) = (32, 96);
    let truth = wide_layer(d, f);
    let start = halved(&truth);
    let cx = Context::cpu(0);
    // Hardly more tokens than the 768 features, and twice as many.
    for (tokens, ridges) in [(900, &[0.1, 1.0][..]), (1600, &[0.01, 0.1, 1.0])] {
        let mut x = Numbers(7).matrix(tokens, d);
        // Directions of very different energies, as hidden states have.
        for (i, mut column) in x.columns_mut().into_iter().enumerate() {
            column *= 3.0 * 0.9f32.powi(i as i32);
        }
        let targets = output(&truth, &x, false);
        let task = with(&x, &targets, false, tokens / 10);
        for &ridge in ridges {
            let dense =
                LeastSquares { ridges: vec![ridge], token_limit: 0, ..LeastSquares::default() };
            let error = |solver: LeastSquares| {
                task.error(&solver.recover(&task, start.clone(), &cx).unwrap(), &cx).unwrap()
            };
            let after = |iterations| {
                let (dense_limit, tolerance) = (0, 0.0);
                error(LeastSquares { dense_limit, iterations, tolerance, ..dense.clone() })
            };
            let (exact, five, eight) = (error(dense.clone()), after(5), after(8));
            assert!(exact < task.error(&start, &cx).unwrap(), "{tokens} {ridge}");
            let [five, eight] = [five, eight].map(|error| error / exact);
            assert!(five < 1.025 && eight < 1.002, "{tokens} {ridge}: {five} {eight}");
        }
    }
}

#[test]
fn no_more_tokens_are_fitted_than_asked_for_where_features_are_many() {
    let (x, noise) = (Numbers(7).matrix(400, D), Numbers(8).matrix(400, D));
    let truth = layer(3, RoutingRule::softmax(2, true));
    let targets = output(&truth, &x, false) + 0.2 * noise;
    let start = perturbed(&truth, 4, 0.5, false);
    let fit = |solver: LeastSquares, x: &Array2<f32>, targets: &Array2<f32>| {
        let task = with(x, targets, false, 50);
        solver.recover(&task, start.clone(), &Context::cpu(0)).unwrap()
    };
    // Every fifth of the 350 that may be fitted, and all 50 that judge.
    let rows: Vec<usize> = (0..350).step_by(5).chain(350..400).collect();
    let few = [&x, &targets].map(|all| all.select(ndarray::Axis(0), &rows));
    let [dense, iterative, tokens] = solvers(0.1);
    for solver in [iterative, tokens] {
        let thinned = LeastSquares { most_tokens: Some(70), ..solver.clone() };
        let found = fit(thinned, &x, &targets);
        assert_eq!(found, fit(solver.clone(), &few[0], &few[1]));
        assert_ne!(found, fit(solver, &x, &targets));
    }
    let thinned = LeastSquares { most_tokens: Some(70), ..dense.clone() };
    assert_eq!(fit(thinned, &x, &targets), fit(dense, &x, &targets));
}

#[test]
fn least_squares_solves_the_ridged_problem() {
    // At the minimum the gradient of the fitted rows' loss vanishes: Σ miss · hidden = λ Δ.
    let (x, noise) = (Numbers(7).matrix(300, D), Numbers(8).matrix(300, D));
    let rule = RoutingRule::softmax(1, false);
    let truth = layer(3, rule);
    let targets = output(&truth, &x, true) + 0.2 * noise;
    let task = with(&x, &targets, true, 0);
    let start = perturbed(&truth, 4, 0.5, false);
    let found = solvers(0.1)[0].recover(&task, start.clone(), &Context::cpu(0)).unwrap();
    let cpu = mcsmoe::linalg::Cpu::new();
    let miss = &targets - &output(&found, &x, true);
    let visits = found.visits(true, x.view(), &cpu).unwrap();
    let mut hidden = Vec::new();
    let mut total = 0.0;
    for (expert, visits) in found.experts.iter().zip(&visits) {
        let mut h = expert.view().hidden(x.view(), &cpu).unwrap();
        let mut kept = Array2::<f32>::zeros(h.dim());
        visits.iter().for_each(|(t, w)| kept.row_mut(*t).assign(&(&h.row(*t) * *w)));
        h.assign(&kept);
        total += h.iter().map(|v| v * v).sum::<f32>();
        hidden.push(h);
    }
    let lambda = 0.1 * total / (F * found.experts.len()) as f32;
    for ((h, new), old) in hidden.iter().zip(&found.experts).zip(&start.experts) {
        let pull = &new.view().down.weight - &old.view().down.weight;
        approx::assert_abs_diff_eq!(miss.t().dot(h), pull * lambda, epsilon = 1e-3);
    }
}

/// What is left of `start` by a solver that may choose from these ridges.
fn by_ridges(
    solver: &LeastSquares,
    ridges: &[f64],
    task: &Recovery<'_>,
    start: &MergedLayer,
) -> MergedLayer {
    let solver = LeastSquares { ridges: ridges.to_vec(), ..solver.clone() };
    solver.recover(task, start.clone(), &Context::cpu(0)).unwrap()
}

#[test]
fn few_tokens_are_not_trusted_with_a_small_ridge() {
    let truth = layer(3, RoutingRule::softmax(2, true));
    let start = perturbed(&truth, 4, 0.5, true);
    let features = F * truth.experts.len();
    for (fitted, few) in [(2 * features - 1, true), (2 * features, false)] {
        let x = Numbers(7).matrix(fitted + 50, D);
        // Without noise the smallest ridge is the best one.
        let targets = output(&truth, &x, false);
        let task = with(&x, &targets, false, 50);
        for solver in solvers(0.0) {
            let of = |ridges: &[f64]| by_ridges(&solver, ridges, &task, &start);
            let (small, large) = (of(&[1e-3]), of(&[0.1]));
            assert!(small != large && small != start && large != start);
            assert_eq!(of(&[1e-3, 0.1]), if few { large } else { small });
        }
    }
}

#[test]
fn many_tokens_need_no_large_ridge() {
    let cx = Context::cpu(0);
    let truth = layer(3, RoutingRule::softmax(2, true));
    let start = perturbed(&truth, 4, 0.3, true);
    let features = F * truth.experts.len();
    for (fitted, many) in [(6 * features, false), (6 * features + 1, true)] {
        let (x, noise) = (Numbers(7).matrix(fitted + 50, D), Numbers(8).matrix(fitted + 50, D));
        // So noisy that the judging rows are for the large ridge.
        let targets = output(&truth, &x, false) + 2.0 * noise;
        let task = with(&x, &targets, false, 50);
        for solver in solvers(0.0) {
            let of = |ridges: &[f64]| by_ridges(&solver, ridges, &task, &start);
            let (small, large) = (of(&[0.1]), of(&[10.0]));
            assert!(large != start);
            assert!(task.error(&large, &cx).unwrap() < task.error(&small, &cx).unwrap());
            assert_eq!(of(&[0.1, 10.0]), if many { small } else { large.clone() });
            // Where there is no other, it is taken.
            assert_eq!(of(&[10.0]), large);
        }
    }
}

/// Whether it is the one that has to fail.
fn wild(recoverer: &dyn Recoverer) -> bool {
    format!("{recoverer:?}").contains("e30")
}

fn recoverers() -> Vec<Box<dyn Recoverer>> {
    let [features, iterative, tokens] =
        solvers(0.0).map(|s| LeastSquares { ridges: LeastSquares::default().ridges, ..s });
    let distill = Distill { epochs: 3, batch: 64, ..Distill::default() };
    let wild = Distill { learning_rate: 1e30, ..distill.clone() };
    let chain = Sequence(vec![Box::new(LeastSquares::default()), Box::new(distill.clone())]);
    vec![
        Box::new(Scale::default()),
        Box::new(UnitScale::default()),
        Box::new(UnitScale { dense_limit: 0, ..UnitScale::default() }),
        Box::new(UnitScale { per: Per::Output, ..UnitScale::default() }),
        Box::new(features),
        Box::new(iterative),
        Box::new(tokens),
        Box::new(distill),
        Box::new(wild),
        Box::new(KnowledgeDistillation {
            epochs: 3,
            batch: 64,
            ..KnowledgeDistillation::default()
        }),
        Box::new(chain),
    ]
}

#[test]
fn nothing_gets_worse_on_the_rows_that_judge() {
    for (seed, tokens) in [(1, 40), (2, 3), (3, 1), (4, 200)] {
        let x = Numbers(seed).matrix(tokens, D);
        // Targets without any relation to the layer: most of what is fitted is noise.
        let targets = Numbers(seed + 50).matrix(tokens, D);
        for (rule, narrowed) in rules().into_iter().flat_map(|r| [(r, true), (r, false)]) {
            for held_out in [0, tokens / 3, tokens] {
                let task = with(&x, &targets, narrowed, held_out);
                let start = layer(seed, rule);
                let cx = Context::cpu(seed);
                let before = task.error(&start, &cx).unwrap();
                for recoverer in recoverers() {
                    let found = recoverer.recover(&task, start.clone(), &cx).unwrap();
                    let after = task.error(&found, &cx).unwrap();
                    assert!(after <= before, "{}: {before} to {after}", recoverer.name());
                    assert_eq!(found.grouping, start.grouping);
                    if held_out == tokens {
                        assert_eq!(found, start, "{}", recoverer.name());
                    }
                }
            }
        }
    }
}

#[test]
fn experts_without_tokens_keep_every_bit() {
    let mut start = layer(1, RoutingRule::softmax(2, true));
    // A bias that never lets group 2 be chosen.
    let router = start.narrowed.take().unwrap();
    let mut bias = router.bias().unwrap().clone();
    bias[2] = -1e3;
    let rule = *router.rule();
    start.narrowed = Some(Router::new(router.weight().to_owned(), Some(bias), None, rule).unwrap());
    let x = Numbers(9).matrix(300, D);
    let targets = Numbers(10).matrix(300, D);
    let task = with(&x, &targets, true, 30);
    for recoverer in recoverers() {
        let found = recoverer.recover(&task, start.clone(), &Context::cpu(0)).unwrap();
        assert!(found != start || wild(&recoverer), "{}", recoverer.name());
        assert_eq!(found.experts[2], start.experts[2], "{}", recoverer.name());
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let x = Numbers(9).matrix(1300, D);
    let start = layer(1, sigmoid_rule());
    let targets = output(&layer(2, sigmoid_rule()), &x, true);
    let task = with(&x, &targets, true, 200);
    for recoverer in recoverers() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| recoverer.recover(&task, start.clone(), &Context::cpu(3)).unwrap())
        };
        assert!(run(1) == run(2), "{}", recoverer.name());
    }
}

#[test]
fn misfits_name_the_layer() {
    let start = layer(1, sigmoid_rule());
    let x = Numbers(9).matrix(10, D);
    let narrow = x.slice(s![.., 1..]).to_owned();
    let mut bad = x.clone();
    bad[[2, 2]] = f32::NAN;
    for recoverer in recoverers() {
        let of = |targets: &Array2<f32>| {
            let task = with(&x, targets, true, 2);
            recoverer.recover(&task, start.clone(), &Context::cpu(0)).unwrap_err()
        };
        let (shape, nan) = (of(&narrow), of(&bad));
        assert!(matches!(shape.kind(), ErrorKind::Shape { .. }), "{shape}");
        assert!(matches!(nan.kind(), ErrorKind::NotFinite { .. }), "{nan}");
        assert!(nan.to_string().starts_with("layers.3: "), "{nan}");
    }
}

#[test]
fn distillation_brings_everything_back_towards_the_original() {
    let x = Numbers(11).matrix(2000, D);
    for (rule, narrowed) in [(sigmoid_rule(), true), (RoutingRule::softmax(2, true), false)] {
        let truth = layer(1, rule);
        let targets = output(&truth, &x, narrowed);
        let task = with(&x, &targets, narrowed, 200);
        let start = perturbed(&truth, 2, 0.3, false);
        let cx = Context::cpu(0);
        let before = task.error(&start, &cx).unwrap();
        let distill = Distill { epochs: 30, batch: 128, learning_rate: 3e-3, ..Distill::default() };
        let found = distill.recover(&task, start.clone(), &cx).unwrap();
        let after = task.error(&found, &cx).unwrap();
        assert!(after < 0.5 * before, "{before} to {after}");
        // What is not to be trained keeps every bit.
        let frozen = Distill { experts: false, epochs: 3, ..distill.clone() };
        let found = frozen.recover(&task, start.clone(), &cx).unwrap();
        assert_eq!(found.experts, start.experts);
        let fixed = Distill { router: false, epochs: 3, ..distill };
        let found = fixed.recover(&task, start.clone(), &cx).unwrap();
        assert_eq!((&found.router, &found.narrowed), (&start.router, &start.narrowed));
        assert_ne!(found.experts, start.experts);
    }
}

#[test]
fn the_papers_losses_bring_the_experts_back_and_leave_the_router() {
    let x = Numbers(11).matrix(1200, D);
    let truth = layer(1, RoutingRule::softmax(2, true));
    let targets = output(&truth, &x, false);
    let task = with(&x, &targets, false, 120);
    let start = perturbed(&truth, 2, 0.3, false);
    let cx = Context::cpu(0);
    let before = task.error(&start, &cx).unwrap();
    for hidden_loss in [HiddenLoss::LogMse, HiddenLoss::Cosine] {
        // The logarithm's slope grows as the error falls; the cosine's does not.
        let hidden = if hidden_loss == HiddenLoss::Cosine { 20.0 } else { 1.0 };
        let paper = KnowledgeDistillation {
            batch: 64,
            hidden,
            hidden_loss,
            ..KnowledgeDistillation::default()
        };
        let found = paper.recover(&task, start.clone(), &cx).unwrap();
        let after = task.error(&found, &cx).unwrap();
        assert!(after < 0.8 * before, "{hidden_loss:?}: {before} to {after}");
        assert_eq!((&found.router, &found.narrowed), (&start.router, &start.narrowed));
    }
    for bad in [
        KnowledgeDistillation { alpha: -1.0, ..KnowledgeDistillation::default() },
        KnowledgeDistillation { hidden: f64::NAN, ..KnowledgeDistillation::default() },
        KnowledgeDistillation { temperature: 0.0, ..KnowledgeDistillation::default() },
    ] {
        let error = bad.recover(&task, start.clone(), &cx).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
    }
}

#[test]
fn only_the_router_that_is_used_is_trained() {
    let x = Numbers(11).matrix(500, D);
    let start = layer(1, RoutingRule::softmax(2, true));
    let targets = output(&layer(2, RoutingRule::softmax(2, true)), &x, true);
    for narrowed in [true, false] {
        let task = with(&x, &targets, narrowed, 50);
        let distill = Distill { epochs: 3, batch: 64, ..Distill::default() };
        let found = distill.recover(&task, start.clone(), &Context::cpu(0)).unwrap();
        assert_eq!(found.router == start.router, narrowed);
        assert_eq!(found.narrowed == start.narrowed, !narrowed);
        let correction = |layer: &MergedLayer| layer.router.correction().cloned();
        assert_eq!(correction(&found), correction(&start));
    }
}

#[test]
fn scale_finds_planted_factors() {
    let x = Numbers(5).matrix(400, D);
    for (rule, narrowed) in rules().into_iter().flat_map(|r| [(r, true), (r, false)]) {
        let truth = layer(1, rule);
        let targets = output(&truth, &x, narrowed);
        let task = with(&x, &targets, narrowed, 40);
        let mut start = truth.clone();
        for (expert, factor) in start.experts.iter_mut().zip([0.5, 0.8, 1.1, 1.0]) {
            let activation = expert.view().activation;
            let (gate, up, mut down) = expert.clone().into_parts();
            down.weight *= factor;
            down.bias.iter_mut().for_each(|bias| *bias *= factor);
            *expert = Expert::new(gate, up, down, activation).unwrap();
        }
        let found = Scale { ridge: 1e-9 }.recover(&task, start, &Context::cpu(0)).unwrap();
        for (a, b) in found.experts.iter().zip(&truth.experts) {
            let (a, b) = (a.view().down, b.view().down);
            approx::assert_abs_diff_eq!(a.weight, b.weight, epsilon = 1e-4);
            approx::assert_abs_diff_eq!(a.bias.unwrap(), b.bias.unwrap(), epsilon = 1e-4);
        }
    }
}

#[test]
fn unit_scale_finds_planted_factors() {
    let x = Numbers(5).matrix(900, D);
    let cases = [
        (Per::Hidden, true, 4096),
        (Per::Hidden, false, 4096),
        (Per::Hidden, true, 0),
        (Per::Output, true, 4096),
    ];
    for (per, narrowed, dense_limit) in cases {
        let truth = layer(1, RoutingRule::softmax(2, true));
        let targets = output(&truth, &x, narrowed);
        let task = with(&x, &targets, narrowed, 90);
        let (mut start, mut numbers) = (truth.clone(), Numbers(77));
        for expert in &mut start.experts {
            let activation = expert.view().activation;
            let (gate, up, mut down) = expert.clone().into_parts();
            let axis = ndarray::Axis(if per == Per::Hidden { 1 } else { 0 });
            for mut line in down.weight.axis_iter_mut(axis) {
                line *= 1.0 + 0.3 * numbers.next();
            }
            *expert = Expert::new(gate, up, down, activation).unwrap();
        }
        let ridges = vec![1e-7];
        let fit = UnitScale { per, ridges, dense_limit, iterations: 300, tolerance: 1e-7 };
        let cx = Context::cpu(0);
        let before = task.error(&start, &cx).unwrap();
        let found = fit.recover(&task, start, &cx).unwrap();
        let after = task.error(&found, &cx).unwrap();
        assert!(before > 1e-3 && after < 1e-4 * before, "{per:?}: {before} to {after}");
        for (a, b) in found.experts.iter().zip(&truth.experts) {
            let (a, b) = (a.view().down, b.view().down);
            approx::assert_abs_diff_eq!(a.weight, b.weight, epsilon = 1e-2);
            assert_eq!(a.bias, b.bias);
        }
    }
}

#[test]
fn few_tokens_do_not_spoil_the_layer_for_others() {
    // 24 tokens, of which 4 judge, for 40 features.
    let (x, fresh) = (Numbers(5).matrix(24, D), Numbers(6).matrix(2000, D));
    for (rule, narrowed) in rules().into_iter().flat_map(|r| [(r, true), (r, false)]) {
        let truth = layer(1, rule);
        let targets = output(&truth, &x, narrowed);
        let task = with(&x, &targets, narrowed, 4);
        let start = perturbed(&truth, 2, 0.3, false);
        let expected = output(&truth, &fresh, narrowed);
        let unseen = with(&fresh, &expected, narrowed, 0);
        let cx = Context::cpu(0);
        let before = unseen.error(&start, &cx).unwrap();
        for recoverer in recoverers() {
            let found = recoverer.recover(&task, start.clone(), &cx).unwrap();
            let after = unseen.error(&found, &cx).unwrap();
            assert!(after < 1.2 * before, "{}: {before} to {after}", recoverer.name());
        }
    }
}
