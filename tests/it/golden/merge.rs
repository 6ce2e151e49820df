//! The mergers against tensors computed by the published code of M-SMoE.
//!
//! Six two-matrix experts (`d = 8`, `f = 12`) and three Mixtral layers were merged by that code
//! with stored labels and usages. The hidden states of the activation-matching functions are the
//! 50 rows of `hidden` dealt out to the six experts in turn: row `t` was routed to expert
//! `t mod 6`.

use std::collections::BTreeMap;

use crate::support::golden::Golden;

use mcsmoe::merge::{
    Coefficients, Fisher, Ingredient, ReferenceCompat, Weighted, Weighting, ZipIt,
};
use mcsmoe::model::{
    Expert, ExpertView, LayerId, MoeLayer, Permutation, Router, Routing, RoutingRule, RoutingStats,
    Samples,
};
use mcsmoe::stage::{Context, LayerView, Members, Merger};
use ndarray::{Array2, Axis};

/// The published code computes in `f32`, in another order of operations.
const TOLERANCE: f32 = 1e-6;

fn groups(file: &Golden, name: &str) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, label) in file.indices(name).into_iter().enumerate() {
        groups.entry(label).or_default().push(i);
    }
    groups.into_values().collect()
}

/// Counts that give these usages exactly: they are multiples of 1/80 or 1/120.
fn counts(usage: &[f32], pairs: f32) -> Vec<u64> {
    usage.iter().map(|u| (u * pairs).round() as u64).collect()
}

/// The assignment of columns to rows with the largest total gain, by the O(n³) Hungarian method.
fn assignment(gain: &Array2<f64>) -> Permutation {
    let n = gain.nrows();
    let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    let (mut row_of, mut way) = (vec![0; n + 1], vec![0; n + 1]);
    for i in 1..=n {
        row_of[0] = i;
        let (mut least, mut used) = (vec![f64::INFINITY; n + 1], vec![false; n + 1]);
        let mut j0 = 0;
        while row_of[j0] != 0 {
            used[j0] = true;
            let (i0, mut delta, mut j1) = (row_of[j0], f64::INFINITY, 0);
            for j in 1..=n {
                if used[j] {
                    continue;
                }
                let reduced = -gain[[i0 - 1, j - 1]] - u[i0] - v[j];
                if reduced < least[j] {
                    (least[j], way[j]) = (reduced, j0);
                }
                if least[j] < delta {
                    (delta, j1) = (least[j], j);
                }
            }
            for j in 0..=n {
                if used[j] {
                    u[row_of[j]] += delta;
                    v[j] -= delta;
                } else {
                    least[j] -= delta;
                }
            }
            j0 = j1;
        }
        while j0 != 0 {
            (row_of[j0], j0) = (row_of[way[j0]], way[j0]);
        }
    }
    let mut gather = vec![0; n];
    (1..=n).for_each(|j| gather[row_of[j] - 1] = j as u32 - 1);
    Permutation::new(gather).unwrap()
}

#[derive(Clone, Copy)]
enum Align {
    No,
    Weights,
    Activations,
}

fn by_weights(reference: &ExpertView<'_>, target: &ExpertView<'_>) -> Permutation {
    let wide = |a: ndarray::ArrayView2<'_, f32>| a.mapv(f64::from);
    let (ri, ti) = (wide(reference.up.weight), wide(target.up.weight));
    let (ro, to) = (wide(reference.down.weight), wide(target.down.weight));
    assignment(&(ri.dot(&ti.t()) + ro.t().dot(&to)))
}

fn by_activations(
    reference: &ExpertView<'_>,
    target: &ExpertView<'_>,
    x: &Array2<f32>,
    cx: &Context,
) -> Permutation {
    let standard = |e: &ExpertView<'_>| {
        let h = e.hidden(x.view(), cx.compute()).unwrap().mapv(f64::from);
        let h = &h - &h.mean_axis(Axis(0)).unwrap();
        let deviation = h.std_axis(Axis(0), 1.0).mapv(|s| s.max(1e-12));
        h / deviation
    };
    assignment(&standard(reference).t().dot(&standard(target)))
}

fn switch_layer() -> MoeLayer {
    let file = Golden::open("switch_experts");
    let expert =
        |i| Expert::relu(file.matrix(&format!("wi.{i}")), file.matrix(&format!("wo.{i}"))).unwrap();
    let rule = RoutingRule::softmax(1, false);
    let router = Router::new(Array2::zeros((6, 8)), None, None, rule).unwrap();
    MoeLayer::new(LayerId::causal(1), (0..6).map(expert).collect(), router).unwrap()
}

fn switch_samples() -> Samples {
    let inputs = Golden::open("switch_perms").matrix("hidden");
    let t = inputs.nrows();
    let routing = Routing {
        experts: Array2::from_shape_fn((t, 1), |(t, _)| (t % 6) as u32),
        weights: Array2::ones((t, 1)),
    };
    Samples { inputs, logits: Array2::zeros((t, 6)), routing, routed_output: None }
}

/// Largest difference of a merged expert from a stored one.
fn distance(a: &Expert, b: &Expert) -> f32 {
    let pairs = a.view().linears().zip(b.view().linears());
    let each = pairs.flat_map(|((_, a), (_, b))| {
        assert_eq!(a.weight.dim(), b.weight.dim());
        (&a.weight - &b.weight).into_iter().map(f32::abs).collect::<Vec<_>>()
    });
    each.fold(0.0, f32::max)
}

/// Merges each group of a stored run and compares every member with the stored result.
fn check(name: &str, merger: &dyn Merger, align: Align, stats: RoutingStats) {
    let (file, layer, cx) = (Golden::open(name), switch_layer(), Context::cpu(0));
    let samples = switch_samples();
    for indices in groups(&file, "label") {
        let experts: Vec<_> = indices.iter().map(|&i| layer.experts()[i].view()).collect();
        let inputs = samples.inputs_of(&indices);
        let permutation = |(at, expert): (usize, &ExpertView<'_>)| match align {
            _ if at == 0 => Permutation::identity(12),
            Align::No => Permutation::identity(12),
            Align::Weights => by_weights(&experts[0], expert),
            Align::Activations => by_activations(&experts[0], expert, &inputs, &cx),
        };
        let permutations: Vec<_> = experts.iter().enumerate().map(permutation).collect();
        let view = LayerView::of(&layer, &stats);
        let members = Members {
            layer: view,
            indices: &indices,
            dominant: 0,
            experts: &experts,
            permutations: &permutations,
        };
        let merged = merger.merge(&members, &cx).unwrap();
        for i in &indices {
            let (wi, wo) = (file.matrix(&format!("wi.{i}")), file.matrix(&format!("wo.{i}")));
            let error = distance(&merged, &Expert::relu(wi, wo).unwrap());
            assert!(error <= TOLERANCE, "{name}: expert {i} of group {indices:?}: {error}");
        }
    }
}

fn usage(name: &str) -> RoutingStats {
    RoutingStats::from_counts(counts(&Golden::open(name).vector("usage"), 80.0), 80)
}

#[test]
fn the_small_assignment_solver_agrees_with_the_stored_permutations() {
    let (file, layer) = (Golden::open("switch_perms"), switch_layer());
    for i in 1..6 {
        let found = by_weights(&layer.experts()[0].view(), &layer.experts()[i].view());
        let stored = file.indices(&format!("perm.wo1.{i}"));
        assert_eq!(found.as_slice(), stored);
    }
}

#[test]
fn usage_weighted() {
    let merger = Weighted::reference(Weighting::Usage);
    check("merge_freq", &merger, Align::No, usage("merge_freq"));
    check("merge_freq_perm", &merger, Align::Weights, usage("merge_freq_perm"));
}

#[test]
fn averages() {
    let merger = Weighted::new(Weighting::Uniform);
    check("merge_avg", &merger, Align::No, usage("merge_avg"));
    check("merge_rebasin", &merger, Align::Weights, usage("merge_rebasin"));
    check("merge_repair_act", &merger, Align::Activations, usage("merge_repair_act"));
}

#[test]
fn zipped_by_activations_and_by_weights() {
    let reference = ZipIt { coefficients: Coefficients::Reference, ..ZipIt::default() };
    let stats = RoutingStats { samples: Some(switch_samples()), ..usage("merge_zipit") };
    check("merge_zipit", &ZipIt { by: Weighting::Uniform, ..reference }, Align::No, stats);
    let by_weights = ZipIt { ingredient: Ingredient::Weights, ..reference };
    check("merge_zip_weight_freq", &by_weights, Align::No, usage("merge_zip_weight_freq"));
}

#[test]
fn fisher_weighted() {
    let file = Golden::open("merge_fisher");
    let fisher = |i: usize| {
        let of = |m: &str| file.matrix(&format!("L.experts.expert_{i}.{m}.weight"));
        Expert::relu(of("wi"), of("wo")).unwrap()
    };
    let stats = RoutingStats {
        fisher: Some((0..6).map(fisher).collect()),
        ..RoutingStats::from_counts(vec![1; 6], 6)
    };
    let merger = Fisher { compat: Some(ReferenceCompat::default()) };
    check("merge_fisher", &merger, Align::No, stats);
}

#[test]
fn mixtral() {
    let file = Golden::open("mixtral_all");
    let cx = Context::cpu(0);
    for l in 0..3 {
        let name = format!("model.layers.{l}.block_sparse_moe");
        let expert = |prefix: &str, i: usize, suffix: &str| {
            let w = |m| file.matrix(&format!("{prefix}{i}.{m}{suffix}"));
            Expert::swiglu(w("w1"), w("w3"), w("w2")).unwrap()
        };
        let experts = |i| expert(&format!("{name}.experts."), i, ".weight");
        let rule = RoutingRule::softmax(2, true);
        let router = Router::new(file.matrix(&format!("{name}.gate.weight")), None, None, rule);
        let layer =
            MoeLayer::new(LayerId::causal(l), (0..4).map(experts).collect(), router.unwrap());
        let layer = layer.unwrap();
        let stored = file.vector(&format!("usage.{name}"));
        let stats = RoutingStats::from_counts(counts(&stored, 120.0), 60);
        for (found, stored) in stats.usage().iter().zip(&stored) {
            assert!(
                (found - f64::from(*stored)).abs() < 1e-6,
                "the counts give {found} for {stored}"
            );
        }
        for indices in groups(&file, &format!("label.{name}")) {
            let views: Vec<_> = indices.iter().map(|&i| layer.experts()[i].view()).collect();
            let members = Members {
                layer: LayerView::of(&layer, &stats),
                indices: &indices,
                dominant: 0,
                experts: &views,
                permutations: &vec![Permutation::identity(12); indices.len()],
            };
            let merged = Weighted::reference(Weighting::Usage).merge(&members, &cx).unwrap();
            for &i in &indices {
                let error = distance(&merged, &expert(&format!("merged.{name}."), i, ""));
                assert!(error <= TOLERANCE, "layer {l}, expert {i}: {error}");
            }
        }
    }
}
