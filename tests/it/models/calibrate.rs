//! Statistics of the native forward pass against those of the reference implementation.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::fixture;
use crate::support::weights;
use crate::support::weights::Folder;
use mcsmoe::ErrorKind;
use mcsmoe::calibrate::{Batch, Collector, StatsFile};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::linalg::Cpu;
use mcsmoe::model::{
    Expert, Grouping, LayerId, MergedLayer, OutputSums, Router, Routing, RoutingRule, RoutingStats,
    Samples,
};
use mcsmoe::pipeline::{CalibrateOptions, Tokens, calibrate};
use mcsmoe::stage::{Context, Needs};
use ndarray::{Array2, ArrayView2, Axis, array};

/// Both sides compute in f32; what differs is the order of additions.
const TOLERANCE: f64 = 1e-5;

fn ids(tensors: &weights::Tensors, name: &str) -> Vec<u32> {
    tensors[name].iter().map(|&x| x as u32).collect()
}

/// The windows that a reference file was made of: `window` tokens each, or, in an encoder-decoder
/// model, input that ends with 1 and decoder input that begins with 0.
fn tokens(path: &Path, window: usize) -> Tokens {
    let tensors = weights::tensors(path);
    if tensors.contains_key("token_ids") {
        let windows = ids(&tensors, "token_ids");
        return Tokens::Windows(windows.chunks(window).map(<[u32]>::to_vec).collect());
    }
    let inputs = ids(&tensors, "encoder.token_ids");
    let inputs = inputs.split_inclusive(|&id| id == 1).map(<[u32]>::to_vec);
    let decoder = ids(&tensors, "decoder.token_ids");
    // The last target is predicted, but never read.
    let targets = decoder.split(|&id| id == 0).skip(1).map(|t| [t, &[1]].concat());
    Tokens::Pairs(inputs.zip(targets).collect())
}

/// The largest `|a − b|` in units of the largest `|b|`.
fn gap<'a>(a: impl IntoIterator<Item = &'a f64>, b: impl IntoIterator<Item = &'a f64>) -> f64 {
    let (a, b): (Vec<_>, Vec<_>) = (a.into_iter().collect(), b.into_iter().collect());
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((*a - b).abs())) / scale
}

fn wide(a: &Array2<f32>) -> Array2<f64> {
    a.mapv(f64::from)
}

/// Weights by expert, so that the order within a row has no meaning.
fn spread(samples: &Samples) -> Array2<f64> {
    let mut all = Array2::zeros(samples.logits.dim());
    for (t, (chosen, weights)) in
        samples.routing.experts.rows().into_iter().zip(samples.routing.weights.rows()).enumerate()
    {
        chosen.iter().zip(weights).for_each(|(&e, &w)| all[[t, e as usize]] += f64::from(w));
    }
    all
}

/// Tokens whose choice differs; each must be a tie within the rounding of the logits.
fn ties(found: &Samples, expected: &Samples) -> Vec<usize> {
    let rows = found.routing.experts.rows().into_iter().zip(expected.routing.experts.rows());
    let differs =
        |(t, (a, b)): (usize, (ndarray::ArrayView1<'_, u32>, ndarray::ArrayView1<'_, u32>))| {
            let sorted = |row: ndarray::ArrayView1<'_, u32>| {
                let mut row = row.to_vec();
                row.sort_unstable();
                row
            };
            (sorted(a) != sorted(b)).then_some(t)
        };
    rows.enumerate().filter_map(differs).collect()
}

/// Compares a layer part by part; returns the gaps by name.
fn compare(found: &RoutingStats, expected: &RoutingStats) -> BTreeMap<&'static str, f64> {
    let mut gaps = BTreeMap::new();
    assert_eq!(found.tokens, expected.tokens);
    let vectors = [
        ("mass", &found.router_mass, &expected.router_mass),
        ("norm", &found.output_norm, &expected.output_norm),
        ("reap", &found.reap, &expected.reap),
    ];
    for (name, a, b) in vectors {
        gaps.insert(name, gap(a.as_ref().unwrap(), b.as_ref().unwrap()));
    }
    let gram = [&found.logit_gram, &expected.logit_gram].map(|g| g.as_ref().unwrap());
    gaps.insert("gram", gap(gram[0], gram[1]));
    let mean = [&found.mean_output, &expected.mean_output].map(|m| wide(m.as_ref().unwrap()));
    gaps.insert("mean", gap(&mean[0], &mean[1]));
    let [a, b] = [found, expected].map(|s| s.samples.as_ref().unwrap());
    gaps.insert("ties", ties(a, b).len() as f64);
    gaps.insert("inputs", gap(&wide(&a.inputs), &wide(&b.inputs)));
    gaps.insert("logits", gap(&wide(&a.logits), &wide(&b.logits)));
    gaps.insert("weights", gap(&spread(a), &spread(b)));
    let output = [a, b].map(|s| wide(s.routed_output.as_ref().unwrap()));
    gaps.insert("output", gap(&output[0], &output[1]));
    let moved = found.counts.iter().zip(&expected.counts).map(|(a, b)| a.abs_diff(*b)).sum::<u64>();
    gaps.insert("moved", moved as f64);
    gaps
}

fn options() -> CalibrateOptions {
    CalibrateOptions { samples: usize::MAX, ..CalibrateOptions::default() }
}

fn expected(path: &Path) -> BTreeMap<LayerId, RoutingStats> {
    let file = StatsFile::open(path).unwrap();
    file.layers().iter().map(|id| (*id, file.layer(id, Needs::OBSERVABLE).unwrap())).collect()
}

#[test]
fn statistics_equal_the_references() {
    let path = fixture("mixtral-8e.stats.safetensors");
    let model = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let found = calibrate(&model, &tokens(&path, 128), Needs::OBSERVABLE)
        .options(options())
        .collect()
        .unwrap();
    let expected = expected(&path);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (id, found) in &found {
        let gaps = compare(found, &expected[id]);
        assert!(gaps.values().all(|&gap| gap <= TOLERANCE), "{id}: {gaps:?}");
    }
}

/// `MCSMOE_CALIBRATE=MODEL:STATS:WINDOW[,…]`: any checkpoint on this machine.
#[test]
#[ignore = "needs a checkpoint and its statistics"]
fn statistics_equal_the_references_on_given_checkpoints() {
    for triple in std::env::var("MCSMOE_CALIBRATE").unwrap().split(',') {
        let parts: Vec<&str> = triple.split(':').collect();
        let (model, path) = (Checkpoint::open(parts[0]).unwrap(), Path::new(parts[1]));
        let tokens = tokens(path, parts[2].parse().unwrap());
        let found =
            calibrate(&model, &tokens, Needs::OBSERVABLE).options(options()).collect().unwrap();
        let expected = expected(path);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (id, found) in &found {
            println!("{} {id}: {:?}", parts[0], compare(found, &expected[id]));
        }
    }
}

#[test]
fn files_scratch_and_threads_do_not_change_a_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (name, tokens) in [("mixtral", windows()), ("switch", pairs())] {
        let model = Folder::open(&fixture("forward").join(name));
        let run = |threads: usize, memory: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let scratch = dir.path().to_owned();
            let options = CalibrateOptions { memory, scratch, ..options() };
            let path = dir.path().join("stats.safetensors");
            pool.install(|| {
                calibrate(&model, &tokens, Needs::OBSERVABLE)
                    .options(options)
                    .write(&path)
                    .unwrap();
            });
            std::fs::read(path).unwrap()
        };
        let one = run(1, u64::MAX);
        assert!([2, 5].into_iter().all(|threads| run(threads, u64::MAX) == one));
        assert!(run(2, 0) == one, "{name}: hidden states in a scratch file");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");

        let all =
            calibrate(&model, &tokens, Needs::OBSERVABLE).options(options()).collect().unwrap();
        let file = StatsFile::open(dir.path().join("stats.safetensors")).unwrap();
        assert_eq!(file.layers(), &all.keys().copied().collect::<Vec<_>>()[..]);
        for (id, stats) in &all {
            let read = file.layer(id, Needs::OBSERVABLE).unwrap();
            assert_eq!((&read.counts, read.tokens), (&stats.counts, stats.tokens));
            assert_eq!((&read.logit_gram, &read.samples), (&stats.logit_gram, &stats.samples));
        }
    }
}

fn window(length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i * 3 + seed * 7 + i) % 64).collect()
}

fn windows() -> Tokens {
    Tokens::Windows((1..40).map(|seed| window(3 + seed % 30, seed)).collect())
}

fn pairs() -> Tokens {
    let pair = |s: u32| (window(20 + s % 25, s), window(1 + s % 30, s + 9));
    Tokens::Pairs((1..40).map(pair).collect())
}

#[test]
fn dropped_choices_count_for_no_expert_and_are_no_samples() {
    let model = Folder::open(&fixture("forward/switch"));
    let stats =
        calibrate(&model, &pairs(), Needs::OBSERVABLE).options(options()).collect().unwrap();
    let dropped: u64 = stats.values().map(|s| s.tokens - s.counts.iter().sum::<u64>()).sum();
    assert!(dropped > 100, "{dropped}");
    for stats in stats.values() {
        let samples = stats.samples.as_ref().unwrap();
        // One choice per token: what is counted is what was not dropped.
        assert_eq!(samples.tokens() as u64, stats.counts.iter().sum::<u64>());
        let mut counts = vec![0; stats.experts()];
        samples.routing.experts.iter().for_each(|&e| counts[e as usize] += 1);
        assert_eq!(counts, stats.counts);
    }
}

#[test]
fn samples_are_bounded_and_spread_evenly() {
    let model = Folder::open(&fixture("forward/mixtral"));
    let all =
        calibrate(&model, &windows(), Needs::OBSERVABLE).options(options()).collect().unwrap();
    let bounded = CalibrateOptions { samples: 50, ..options() };
    let some = calibrate(&model, &windows(), Needs::OBSERVABLE).options(bounded).collect().unwrap();
    for (id, some) in &some {
        let (all, samples) = (&all[id], some.samples.as_ref().unwrap());
        assert_eq!((samples.tokens(), &some.logit_gram), (50, &all.logit_gram));
        let inputs = &all.samples.as_ref().unwrap().inputs;
        let total = inputs.nrows();
        for (i, row) in samples.inputs.rows().into_iter().enumerate() {
            let at = ((i + 1) * total).div_ceil(50) - 1;
            assert_eq!(row, inputs.row(at));
        }
    }
}

fn layer() -> MergedLayer {
    let expert = |by: f32| Expert::relu(Array2::eye(2), Array2::eye(2) * by).unwrap();
    let rule = RoutingRule::softmax(1, false);
    let router = Router::new(Array2::eye(2), None, None, rule).unwrap();
    let grouping = Grouping::identity(2);
    let experts = vec![expert(1.0), expert(10.0)];
    MergedLayer::new(LayerId::causal(0), experts, grouping, router, None).unwrap()
}

#[test]
fn masked_tokens_are_nowhere_and_formulas_hold() {
    let inputs = array![[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [7.0, 7.0]];
    let routing = Routing {
        experts: array![[0], [0], [1], [1]],
        weights: array![[0.5], [1.0], [0.25], [1.0]],
    };
    let mut collector = Collector::new(Needs::OBSERVABLE).unwrap();
    let mask = [true, true, true, false];
    let kept = array![[true], [true], [true], [true]];
    let batch = Batch {
        inputs: inputs.view(),
        logits: inputs.view(),
        routing: &routing,
        kept: Some(kept.view()),
        output: Some(inputs.view()),
        outputs: None,
        mask: Some(&mask),
    };
    let cx = Context::cpu(0);
    collector.add(&layer(), &batch, &cx).unwrap();
    let narrow: ArrayView2<'_, f32> = inputs.view().split_at(Axis(1), 1).0;
    let misfit = collector.add(&layer(), &Batch { logits: narrow, ..batch }, &cx).unwrap_err();
    assert!(matches!(misfit.kind(), ErrorKind::Shape { .. }), "{misfit}");
    let stats = collector.finish().unwrap();
    assert_eq!((stats.tokens, &stats.counts), (3, &vec![2, 1]));
    assert_eq!(stats.router_mass, Some(vec![1.5, 0.25]));
    assert_eq!(stats.mean_gate(), Some(vec![0.75, 0.25]));
    assert_eq!(stats.output_norm, Some(vec![3.0, 20.0]));
    assert_eq!(stats.reap, Some(vec![1.75, 5.0]));
    assert_eq!(stats.mean_output, Some(array![[2.0, 2.0], [0.0, 20.0]]));
    assert_eq!(stats.logit_gram, Some(array![[10.0, 12.0], [12.0, 20.0]]));
    assert_eq!(stats.samples.unwrap().inputs, inputs.slice(ndarray::s![..3, ..]));
}

#[test]
fn outputs_that_the_pass_has_summed_up_are_taken_as_they_are() {
    let inputs = array![[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [5.0, 1.0]];
    let routing = Routing {
        experts: array![[0], [0], [1], [1]],
        weights: array![[0.5], [1.0], [0.25], [1.0]],
    };
    // The last token found no room.
    let kept = array![[true], [true], [true], [false]];
    let (layer, cx) = (layer(), Context::cpu(0));
    let visiting = [vec![0, 1], vec![2]];
    let outputs: Vec<OutputSums> = layer
        .experts
        .iter()
        .zip(&visiting)
        .map(|(expert, tokens)| {
            let x = inputs.select(Axis(0), tokens);
            let outputs = expert.view().forward(x.view(), &Cpu::new()).unwrap();
            OutputSums::of(outputs.view(), &vec![1.0; tokens.len()], 0.0)
        })
        .collect();
    let stats = |outputs| {
        let mut collector = Collector::new(Needs::OBSERVABLE).unwrap();
        let batch = Batch {
            inputs: inputs.view(),
            logits: inputs.view(),
            routing: &routing,
            kept: Some(kept.view()),
            output: Some(inputs.view()),
            outputs,
            mask: None,
        };
        collector.add(&layer, &batch, &cx).map(|()| collector.finish().unwrap())
    };
    let taken = stats(Some(&outputs)).unwrap();
    assert_eq!(taken.output_norm, Some(vec![3.0, 20.0]));
    assert_eq!(taken, stats(None).unwrap());
    let misfit = stats(Some(&[outputs[0].clone(), OutputSums::default()])).unwrap_err();
    assert!(misfit.to_string().contains("outputs per visit"), "{misfit}");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let model = Folder::open(&fixture("forward/mixtral"));
    let fails = |tokens: Tokens, needs| {
        calibrate(&model, &tokens, needs).options(options()).collect().unwrap_err()
    };
    let gradients = fails(windows(), Needs::GRADIENTS);
    assert!(matches!(gradients.kind(), ErrorKind::Missing { .. }), "{gradients}");
    let pairs = fails(pairs(), Needs::REAP);
    assert!(matches!(pairs.kind(), ErrorKind::Unsupported { .. }), "{pairs}");
    for tokens in [vec![], vec![vec![]], vec![vec![1, 64]]] {
        let error = fails(tokens.into(), Needs::REAP);
        assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
    }
}
