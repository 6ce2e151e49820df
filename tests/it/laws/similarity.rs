//! Laws of the similarity metrics, and each metric against its definition.

use std::collections::BTreeSet;

use crate::support::layers::{KINDS, Kind, World, expert, matrix, permutation, pool, world};
use mcsmoe::ErrorKind;
use mcsmoe::linalg::Cpu;
use mcsmoe::model::{
    Expert, LayerId, Measure, MoeLayer, RoutingStats, Samples, SimilarityMatrix, Stack,
};
use mcsmoe::similarity::*;
use mcsmoe::stage::{Context, LayerView, Needs, Similarity};
use ndarray::{Array2, ArrayView1, Axis, array};

const MEASURES: [Measure; 3] = [Measure::Cosine, Measure::Euclidean, Measure::Angular];

/// Every metric with every option, but for the mapping that is unsound by design.
fn metrics() -> Vec<Box<dyn Similarity>> {
    let mut all: Vec<Box<dyn Similarity>> = vec![
        Box::new(MergedOutputError::default()),
        Box::new(FeatureCorrelation { matching: Matching::Assignment }),
        Box::new(FeatureCorrelation { matching: Matching::Maximum }),
        Box::new(Random::default()),
        Box::new(TokenOutputs::default()),
    ];
    for measure in MEASURES {
        all.push(Box::new(RouterLogits { measure }));
        all.push(Box::new(RouterWeights { measure }));
        all.push(Box::new(RouterWeightFeature { measure }));
        all.push(Box::new(ExpertWeights { measure }));
        all.push(Box::new(WeightFeature { measure }));
        all.push(Box::new(Feature { measure }));
        all.push(Box::new(FeatureAbs { measure }));
        all.push(Box::new(Gradients { measure }));
        all.push(Box::new(WeightGradients { measure }));
        for source in [OutputSource::Routed, OutputSource::All] {
            all.push(Box::new(ExpertOutputs { measure, source }));
        }
    }
    all
}

fn small(kind: Kind) -> World {
    world((0..5).map(|i| expert(kind, 6, 11, i)).collect(), 40, 3)
}

fn table(metric: &dyn Similarity, world: &World) -> SimilarityMatrix {
    let view = LayerView::of(&world.layer, &world.stats);
    metric.similarity(&view, &Context::cpu(7)).unwrap()
}

#[test]
fn tables_are_symmetric_and_nothing_is_more_alike_than_itself() {
    for kind in KINDS {
        let world = small(kind);
        for metric in metrics() {
            let table = table(&metric, &world);
            let (s, d) = (table.similarities(), table.distances());
            assert_eq!(s, s.t(), "{metric:?}");
            assert_eq!(d, d.t(), "{metric:?}");
            assert!(s.diag().iter().all(|&s| s == 1.0), "{metric:?}");
            assert!(d.diag().iter().all(|&d| d == 0.0), "{metric:?}");
            assert!(s.iter().all(|&s| (0.0..=1.0).contains(&s)), "{metric:?} {s}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    // Large enough for two blocks of rows in a Gram matrix and two blocks of tokens.
    let world = world((0..4).map(|i| expert(KINDS[3], 26, 330, i)).collect(), 300, 1);
    for metric in metrics() {
        let run = |threads| pool(threads).install(|| table(&metric, &world));
        let one = run(1);
        for threads in [2, 8] {
            let other = run(threads);
            let same =
                |a: Array2<f64>, b: Array2<f64>| a.mapv(f64::to_bits) == b.mapv(f64::to_bits);
            let tables = (other.similarities().to_owned(), one.similarities().to_owned());
            assert!(same(tables.0, tables.1), "{metric:?} on {threads}");
            let tables = (other.distances().to_owned(), one.distances().to_owned());
            assert!(same(tables.0, tables.1), "{metric:?} on {threads}");
        }
    }
}

/// The same layer with the hidden units of every expert shuffled.
fn shuffled(world: &World) -> World {
    let experts = world.layer.experts().iter().zip(0..).map(|(e, i)| {
        e.view().permuted(&permutation(e.view().d_ff(), 50 + i), &Cpu::new()).unwrap()
    });
    let layer =
        MoeLayer::new(world.layer.id(), experts.collect(), world.layer.router().clone()).unwrap();
    World { layer, stats: world.stats.clone() }
}

#[test]
fn output_metrics_do_not_see_the_order_of_hidden_units() {
    for kind in KINDS {
        let world = small(kind);
        let other = shuffled(&world);
        let blind: [&dyn Similarity; 7] = [
            &RouterLogits::default(),
            &RouterWeights::default(),
            &ExpertOutputs::default(),
            &ExpertOutputs { source: OutputSource::All, ..ExpertOutputs::default() },
            &TokenOutputs::default(),
            &FeatureCorrelation { matching: Matching::Assignment },
            &FeatureCorrelation { matching: Matching::Maximum },
        ];
        for metric in blind {
            let (a, b) = (table(metric, &world), table(metric, &other));
            let error = (&a.similarities() - &b.similarities()).mapv(f64::abs);
            // Sums of f32 products in another order: 11 units and 40 tokens of size about 1.
            assert!(error.iter().all(|&e| e <= 200.0 * f64::from(f32::EPSILON)), "{metric:?}");
        }
        let weights = ExpertWeights::default();
        let (a, b) = (table(&weights, &world), table(&weights, &other));
        assert!((&a.similarities() - &b.similarities()).iter().any(|d| d.abs() > 1e-2));
    }
}

#[test]
fn duplicates_are_as_alike_as_can_be() {
    for kind in KINDS {
        let mut experts: Vec<Expert> = (0..5).map(|i| expert(kind, 6, 11, i)).collect();
        experts[3] = experts[1].clone();
        let world = world(experts, 40, 3);
        let metrics: [&dyn Similarity; 4] = [
            &ExpertWeights::default(),
            &ExpertOutputs { source: OutputSource::All, ..ExpertOutputs::default() },
            &TokenOutputs::default(),
            &MergedOutputError::default(),
        ];
        for metric in metrics {
            let s = table(metric, &world).similarities()[[1, 3]];
            assert!(s > 1.0 - 1e-6, "{metric:?} {s}");
        }
    }
}

#[test]
fn missing_statistics_are_named_by_the_stage_that_needs_them() {
    let World { layer, .. } = small(KINDS[2]);
    let bare = RoutingStats::from_counts(vec![1; 5], 5);
    for metric in metrics() {
        let view = LayerView::of(&layer, &bare);
        let found = metric.similarity(&view, &Context::cpu(0));
        if metric.needs().without(Needs::EXPERTS) == Needs::NONE {
            found.unwrap();
            if metric.needs().contains(Needs::EXPERTS) {
                let blind = LayerView::new(layer.id(), layer.router(), &bare);
                assert!(metric.similarity(&blind, &Context::cpu(0)).is_err());
            }
            continue;
        }
        match found.unwrap_err().kind() {
            ErrorKind::Missing { stage, .. } => assert_eq!(stage, metric.name()),
            other => panic!("{metric:?}: {other}"),
        }
    }
}

#[test]
fn names_are_distinct_and_in_kebab_case() {
    let names: BTreeSet<String> = metrics().iter().map(|m| m.name().to_owned()).collect();
    assert_eq!(names.len(), 14);
    assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c == '-')));
}

#[test]
fn unvisited_experts_are_finite_and_statistics_of_another_layer_are_refused() {
    let mut world = small(KINDS[0]);
    let samples = world.stats.samples.as_mut().unwrap();
    samples.routing.experts.fill(2);
    for metric in metrics() {
        table(&metric, &world);
    }
    let pair = |m: &dyn Similarity, w: &World| table(m, w).similarities()[[0, 1]];
    assert_eq!(pair(&MergedOutputError::default(), &world), 1.0);
    assert_eq!(pair(&FeatureCorrelation::default(), &world), 1.0);
    assert_eq!(pair(&TokenOutputs::default(), &world), 1.0);
    assert_eq!(pair(&Feature::default(), &world), 0.5);
    world.stats.samples.as_mut().unwrap().routing.experts.fill(9);
    let view = LayerView::of(&world.layer, &world.stats);
    let error = Feature::default().similarity(&view, &Context::cpu(0)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Statistics { .. }), "{error}");
    let samples = world.stats.samples.as_mut().unwrap();
    samples.inputs = matrix(40, 3, 0);
    let view = LayerView::of(&world.layer, &world.stats);
    for metric in metrics().iter().filter(|m| m.needs().contains(Needs::SAMPLES)) {
        let error = metric.similarity(&view, &Context::cpu(0)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{metric:?} {error}");
    }
    let mut other = small(KINDS[0]);
    other.stats.gradients.as_mut().unwrap().pop();
    other.stats.logit_gram = Some(Array2::zeros((4, 4)));
    other.stats.mean_output = Some(Array2::zeros((4, 6)));
    let view = LayerView::of(&other.layer, &other.stats);
    let misfits: [&dyn Similarity; 4] = [
        &Gradients::default(),
        &WeightGradients::default(),
        &RouterLogits::default(),
        &ExpertOutputs::default(),
    ];
    for metric in misfits {
        let error = metric.similarity(&view, &Context::cpu(0)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Shape { .. }), "{metric:?} {error}");
    }
}

fn compare(vectors: &[Vec<f64>], measure: Measure) -> SimilarityMatrix {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let gram = Array2::from_shape_fn((vectors.len(), vectors.len()), |(i, j)| {
        dot(&vectors[i], &vectors[j])
    });
    SimilarityMatrix::from_gram(gram.view(), measure).unwrap()
}

fn assert_close(found: &SimilarityMatrix, expected: &SimilarityMatrix, what: &dyn Similarity) {
    for (a, b) in
        [(found.similarities(), expected.similarities()), (found.distances(), expected.distances())]
    {
        let error = (&a - &b).mapv(f64::abs);
        let scale = b.iter().fold(1.0f64, |m, &x| m.max(x.abs()));
        assert!(error.iter().all(|&e| e <= 2e-6 * scale), "{what:?}: {error}");
    }
}

fn wide(values: ArrayView1<'_, f32>) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// All parameters of an expert in one vector.
fn flat(expert: &Expert) -> Vec<f64> {
    let parts = expert.view();
    let parts = parts.linears().map(|(_, l)| {
        let bias = l.bias.map_or(vec![], |b| b.to_vec());
        l.weight.iter().copied().chain(bias).map(f64::from).collect::<Vec<_>>()
    });
    parts.flatten().collect()
}

#[test]
fn parameter_metrics_follow_their_definitions() {
    for kind in KINDS {
        let world = small(kind);
        let experts = world.layer.experts();
        let weights: Vec<_> = experts.iter().map(flat).collect();
        let gradients: Vec<_> = world.stats.gradients.as_ref().unwrap().iter().map(flat).collect();
        let product =
            |(w, g): (&Vec<f64>, &Vec<f64>)| w.iter().zip(g).map(|(a, b)| a * b).collect();
        let products: Vec<Vec<f64>> = weights.iter().zip(&gradients).map(product).collect();
        for measure in MEASURES {
            let cases: [(&dyn Similarity, &[Vec<f64>]); 3] = [
                (&ExpertWeights { measure }, &weights),
                (&Gradients { measure }, &gradients),
                (&WeightGradients { measure }, &products),
            ];
            for (metric, vectors) in cases {
                assert_close(&table(metric, &world), &compare(vectors, measure), metric);
            }
        }
    }
}

#[test]
fn input_metrics_follow_their_definitions() {
    let world = small(KINDS[2]);
    let samples = world.stats.samples.as_ref().unwrap();
    let visits: Vec<Vec<usize>> = (0..5).map(|i| samples.tokens_of(&[i])).collect();
    let columns = |tokens: &[usize], f: &dyn Fn(Vec<f64>) -> f64| -> Vec<f64> {
        let x = samples.inputs.select(Axis(0), tokens);
        x.columns().into_iter().map(|c| f(wide(c))).collect()
    };
    let norm = |c: Vec<f64>| c.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mean = |c: Vec<f64>| c.iter().sum::<f64>() / c.len() as f64;
    let size = |c: Vec<f64>| c.iter().map(|x| x.abs()).sum::<f64>() / c.len() as f64;
    let per_expert = |f: &dyn Fn(Vec<f64>) -> f64| -> Vec<Vec<f64>> {
        visits.iter().map(|v| columns(v, f)).collect()
    };
    let all: Vec<usize> = (0..40).collect();
    let scale = |w: Vec<f64>, m: &[f64]| -> Vec<f64> {
        w.iter().zip(m.iter().cycle()).map(|(w, m)| w * m).collect()
    };
    let rows = world.layer.router().weight();
    let routers: Vec<_> = rows.rows().into_iter().map(wide).collect();
    let scaled: Vec<_> = routers.iter().map(|w| scale(w.clone(), &columns(&all, &norm))).collect();
    let norms = per_expert(&norm);
    let weighted: Vec<_> = world
        .layer
        .experts()
        .iter()
        .zip(&norms)
        .map(|(e, m)| {
            let read = [e.view().gate.unwrap(), e.view().up];
            scale(read.iter().flat_map(|l| l.weight).map(|&w| f64::from(w)).collect(), m)
        })
        .collect();
    let logits: Vec<_> = samples.logits.columns().into_iter().map(wide).collect();
    for measure in MEASURES {
        let cases: [(&dyn Similarity, Vec<Vec<f64>>); 6] = [
            (&RouterLogits { measure }, logits.clone()),
            (&RouterWeights { measure }, routers.clone()),
            (&RouterWeightFeature { measure }, scaled.clone()),
            (&WeightFeature { measure }, weighted.clone()),
            (&Feature { measure }, per_expert(&mean)),
            (&FeatureAbs { measure }, per_expert(&size)),
        ];
        for (metric, vectors) in cases {
            assert_close(&table(metric, &world), &compare(&vectors, measure), metric);
        }
    }
}

#[test]
fn output_metrics_follow_their_definitions() {
    for kind in KINDS {
        let world = small(kind);
        let experts = world.layer.experts();
        let samples = world.stats.samples.as_ref().unwrap();
        let outputs: Vec<Array2<f32>> = experts
            .iter()
            .map(|e| e.view().forward(samples.inputs.view(), &Cpu::new()).unwrap())
            .collect();
        let means: Vec<Vec<f64>> = outputs
            .iter()
            .map(|y| y.columns().into_iter().map(|c| wide(c).iter().sum::<f64>() / 40.0).collect())
            .collect();
        for measure in MEASURES {
            let metric = ExpertOutputs { measure, source: OutputSource::All };
            assert_close(&table(&metric, &world), &compare(&means, measure), &metric);
        }
        let visits: Vec<Vec<usize>> = (0..5).map(|i| samples.tokens_of(&[i])).collect();
        let cosine = |t: usize, i: usize, j: usize| {
            let both = [wide(outputs[i].row(t)), wide(outputs[j].row(t))];
            compare(&both, Measure::Cosine).distances()[[0, 1]]
        };
        let expected = SimilarityMatrix::from_pairs(5, |i, j| {
            let tokens: Vec<usize> = [&visits[i][..], &visits[j]].concat();
            let sum: f64 = tokens.iter().map(|&t| cosine(t, i, j)).sum();
            let distance = sum / tokens.len().max(1) as f64;
            Ok((1.0 - distance / 2.0, distance))
        });
        let metric = TokenOutputs::default();
        assert_close(&table(&metric, &world), &expected.unwrap(), &metric);
    }
}

/// Two ReLU experts of one unit that scale positive inputs by 1 and by 9.
fn two_scales() -> World {
    let experts = [(1.0, 1.0), (3.0, 3.0)]
        .map(|(up, down)| Expert::relu(array![[up]], array![[down]]).unwrap());
    let mut world = world(experts.to_vec(), 2, 1);
    let routing =
        mcsmoe::model::Routing { experts: array![[0], [1]], weights: array![[1.0], [1.0]] };
    let inputs = array![[1.0], [2.0]];
    let logits = Array2::zeros((2, 2));
    world.stats.samples = Some(Samples { inputs, logits, routing, routed_output: None });
    world
}

#[test]
fn merged_output_error_has_the_values_worked_out_by_hand() {
    // Merged: 2 · 2 = 4. Token 1 of expert 0: 4 − 1 = 3; token 2 of expert 1: 8 − 18 = −10.
    let world = two_scales();
    let sound = table(&MergedOutputError::default(), &world);
    assert_eq!(sound.distances()[[0, 1]], 109.0 / 2.0);
    assert_eq!(sound.similarities()[[0, 1]], 1.0 / (1.0 + 109.0 / 2.0));
    let mapping = ErrorMapping::ReferenceCompat;
    let compat = table(&MergedOutputError { mapping }, &world);
    assert_eq!(compat.similarities()[[0, 1]], 1.0 / (1.0 + 0.1 * 109.0f64.ln()));
    assert_eq!(compat.distances()[[0, 1]], 109.0);
}

#[test]
fn correlated_units_are_found_one_to_one_or_by_the_maximum() {
    // Unit 0 of either expert follows x, both units of the second do: one to one, one of them has
    // to take the unit that follows −x.
    let first = Expert::new(
        None,
        array![[1.0], [-1.0]].into(),
        array![[1.0, 1.0]].into(),
        mcsmoe::model::Activation::Gelu,
    );
    let second = Expert::new(
        None,
        array![[1.0], [1.0]].into(),
        array![[1.0, 1.0]].into(),
        mcsmoe::model::Activation::Gelu,
    );
    let mut world = world(vec![first.unwrap(), second.unwrap()], 2, 1);
    let routing = mcsmoe::model::Routing {
        experts: array![[0], [1], [1]],
        weights: array![[1.0], [1.0], [1.0]],
    };
    let inputs = array![[9.0], [8.0], [-10.0]];
    let logits = Array2::zeros((3, 2));
    world.stats.samples = Some(Samples { inputs, logits, routing, routed_output: None });
    let of = |matching| table(&FeatureCorrelation { matching }, &world).similarities()[[0, 1]];
    // gelu is x above and 0 below: c is the correlation of (9, 8, 0) and (0, 0, 10).
    let c = -(17.0f64 * 10.0 / 3.0) / ((145.0f64 - 289.0 / 3.0) * (100.0 - 100.0 / 3.0)).sqrt();
    approx::assert_abs_diff_eq!(
        of(Matching::Assignment),
        ((1.0 + c) / 2.0 + 1.0) / 2.0,
        epsilon = 1e-6
    );
    let maximum = (((1.0 + c) / 2.0 + 1.0) / 2.0 + 1.0) / 2.0;
    approx::assert_abs_diff_eq!(of(Matching::Maximum), maximum, epsilon = 1e-6);
}

#[test]
fn random_tables_follow_seed_and_layer_only() {
    let world = small(KINDS[0]);
    let draw = |seed, id| {
        let view = LayerView::new(id, world.layer.router(), &world.stats);
        Random::default().similarity(&view, &Context::cpu(seed)).unwrap()
    };
    let layer = LayerId::causal(2);
    assert_eq!(draw(1, layer), draw(1, layer));
    let others = [
        draw(2, layer),
        draw(1, LayerId::causal(3)),
        draw(1, LayerId { stack: Stack::Encoder, index: 2 }),
    ];
    assert!(others.iter().all(|o| *o != draw(1, layer)));
}

#[test]
fn recipes_spell_the_options_in_snake_case() {
    let outputs: ExpertOutputs = serde_json::from_str(r#"{"source": "all"}"#).unwrap();
    assert_eq!(outputs, ExpertOutputs { source: OutputSource::All, ..ExpertOutputs::default() });
    let error: MergedOutputError =
        serde_json::from_str(r#"{"mapping": "reference_compat"}"#).unwrap();
    assert_eq!(error.mapping, ErrorMapping::ReferenceCompat);
    assert!(serde_json::from_str::<RouterLogits>(r#"{"metric": "cosine"}"#).is_err());
}
