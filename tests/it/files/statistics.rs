//! The statistics file: what is read, what is computed, and what is refused.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mcsmoe::calibrate::{StatsFile, write_stats};
use mcsmoe::model::{Activation, Expert, Linear, Routing};
use mcsmoe::model::{LayerId, RoutingStats, Samples};
use mcsmoe::stage::Needs;
use mcsmoe::{Error, ErrorKind};
use ndarray::{Array2, array};

/// A file built by hand: tensors as (name, dtype, shape, bytes).
#[derive(Clone, Default)]
struct Raw {
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
    metadata: BTreeMap<String, String>,
}

impl Raw {
    fn put(mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self.tensors.push((name.into(), dtype, shape.to_vec(), bytes));
        self
    }

    fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.put(name, "F32", shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn i32(self, name: &str, shape: &[usize], values: &[i32]) -> Self {
        self.put(name, "I32", shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn meta(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!(self.metadata));
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = serde_json::json!({
                "dtype": dtype, "shape": shape, "data_offsets": offsets,
            });
            header.insert(name.clone(), entry);
            data.extend(bytes);
        }
        let json = serde_json::Value::Object(header).to_string().into_bytes();
        [(json.len() as u64).to_le_bytes().to_vec(), json, data].concat()
    }

    fn open(&self) -> Result<StatsFile, Error> {
        open(&self.bytes())
    }

    /// The error of reading everything that is there.
    fn refusal(&self) -> Error {
        let read = self.open().and_then(|file| {
            let id = file.layers()[0];
            file.layer(&id, file.available(&id))
        });
        read.expect_err("the file should be refused")
    }
}

fn open(bytes: &[u8]) -> Result<StatsFile, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.safetensors");
    std::fs::write(&path, bytes).unwrap();
    StatsFile::open(&path)
}

const ALL: Needs = Needs::SAMPLES;

fn layer() -> LayerId {
    LayerId::causal(2)
}

/// Three tokens, four experts, top-2, width 2.
fn raw() -> Raw {
    let logits: Vec<f32> = (0..12).map(|i| (i * 7 % 5) as f32 - 1.5).collect();
    Raw::default()
        .f32("layers.2.router_logits", &[3, 4], &logits)
        .i32("layers.2.topk_indices", &[3, 2], &[0, 3, 3, 1, 0, 3])
        .f32("layers.2.topk_weights", &[3, 2], &[0.75, 0.25, 0.5, 0.5, 1.0, 0.0])
        .i32("layers.2.counts", &[4], &[2, 1, 0, 3])
        .f32("layers.2.moe_input", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .i32("token_ids", &[3], &[5, 6, 7])
        .meta("model_type", "mixtral")
}

#[test]
fn counts_mass_and_gram_follow_from_per_token_tensors() {
    let file = raw().without("layers.2.counts").open().unwrap();
    assert_eq!(file.layers(), [layer()]);
    assert_eq!((file.model_type(), file.tokens()), (Some("mixtral"), 3));
    let has = file.available(&layer());
    assert!(has.contains(Needs::LOGIT_GRAM | Needs::ROUTER_MASS | Needs::SAMPLES));
    assert!(!has.contains(Needs::REAP));
    let stats = file.layer(&layer(), Needs::LOGIT_GRAM | Needs::ROUTER_MASS | ALL).unwrap();
    assert_eq!((stats.counts, stats.tokens), (vec![2, 1, 0, 3], 3));
    assert_eq!(stats.router_mass.unwrap(), [1.75, 0.5, 0.0, 0.75]);
    let z = stats.samples.unwrap().logits.mapv(f64::from);
    // Small multiples of 1/2: exact in any order.
    assert_eq!(stats.logit_gram.unwrap(), z.t().dot(&z));
}

#[test]
fn nothing_is_read_that_was_not_asked_for() {
    let nan = raw().f32("layers.2.moe_input", &[3, 2], &[f32::NAN; 6]);
    let stats = nan.open().unwrap().layer(&layer(), Needs::LOGIT_GRAM).unwrap();
    assert!(stats.samples.is_none() && stats.router_mass.is_none());
    let error = nan.open().unwrap().layer(&layer(), Needs::SAMPLES).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFinite { index: 0, .. }), "{error}");
    assert_eq!(error.place().tensor.as_deref(), Some("layers.2.moe_input"));
    assert_eq!(error.place().layer.as_deref(), Some("layers.2"));
    assert!(error.place().file.is_some());
}

#[test]
fn half_precision_and_wide_integers_are_read() {
    let bf16 = |x: f32| half::bf16::from_f32(x).to_le_bytes();
    let f16 = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let weights = [0.75, 0.25, 0.5, 0.5, 1.0, 0.0];
    let raw = raw()
        .put("layers.2.topk_weights", "BF16", &[3, 2], weights.map(bf16).concat())
        .put("layers.2.moe_input", "F16", &[3, 2], weights.map(f16).concat())
        .put("layers.2.counts", "I64", &[4], [2i64, 1, 0, 3].map(i64::to_le_bytes).concat());
    let samples = raw.open().unwrap().layer(&layer(), ALL).unwrap().samples.unwrap();
    assert_eq!(samples.routing.weights, samples.inputs);
    assert_eq!(samples.routing.weights.iter().copied().collect::<Vec<_>>(), weights);
}

#[test]
fn capacity_dropped_choices_count_for_no_expert() {
    let raw = raw().i32("layers.2.topk_indices", &[3, 2], &[0, 3, -1, 1, 0, 3]).i32(
        "layers.2.counts",
        &[4],
        &[2, 1, 0, 2],
    );
    let stats = raw.open().unwrap().layer(&layer(), ALL | Needs::ROUTER_MASS).unwrap();
    assert_eq!(stats.tokens, 3);
    assert_eq!(stats.router_mass.unwrap(), [1.75, 0.5, 0.0, 0.25]);
    assert_eq!(stats.samples.unwrap().inputs, array![[1.0, 2.0], [5.0, 6.0]]);
}

#[test]
fn mass_follows_from_mean_gates() {
    let raw = Raw::default()
        .i32("layers.2.counts", &[2], &[4, 1])
        .f32("layers.2.expert_mean_gate", &[2], &[0.25, 0.5])
        .meta("layers", r#"[{"name": "layers.2", "tokens": 5, "top_k": 1}]"#);
    let stats = raw.open().unwrap().layer(&layer(), Needs::ROUTER_MASS).unwrap();
    assert_eq!(stats.router_mass.unwrap(), [1.0, 0.5]);
}

#[test]
fn samples_may_cover_some_of_the_tokens() {
    let note = r#"[{"name": "layers.2", "tokens": 9, "top_k": 2, "samples": 3}]"#;
    let raw = raw().i32("layers.2.counts", &[4], &[7, 3, 2, 6]).meta("layers", note);
    let file = raw.open().unwrap();
    assert!(!file.available(&layer()).contains(Needs::LOGIT_GRAM));
    let stats = file.layer(&layer(), ALL).unwrap();
    assert_eq!((stats.tokens, stats.samples.unwrap().tokens()), (9, 3));
    let fewer = raw.i32("layers.2.counts", &[4], &[1, 3, 2, 6]);
    assert!(fewer.refusal().to_string().contains("hold 2, the counts 1"));
}

#[test]
fn what_is_absent_is_named() {
    let file = raw().open().unwrap();
    let error = file.layer(&layer(), Needs::REAP | Needs::FISHER).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Missing { .. }));
    assert!(error.to_string().contains("REAP saliency, Fisher information"), "{error}");
    let error = file.layer(&LayerId::causal(7), Needs::NONE).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Statistics { .. }));
    assert!(error.to_string().contains("layers.7: "), "{error}");
    assert!(error.to_string().contains("holds layers.2"), "{error}");
    assert_eq!(file.experts(&layer()), Some(4));
}

#[test]
fn contradictions_are_refused() {
    let statistics = [
        (raw().i32("layers.2.counts", &[4], &[2, -1, 0, 3]), "count: expected 0..=3, found -1"),
        (raw().i32("layers.2.counts", &[4], &[2, 1, 1, 3]), "top-k indices hold 0, the counts 1"),
        (raw().i32("layers.2.counts", &[5], &[2, 1, 0, 3, 0]), "expected [N = 4], found [5]"),
        (
            raw().i32("layers.2.topk_indices", &[3, 2], &[0, 4, 3, 1, 0, 3]),
            "expert: expected −1..4, found 4",
        ),
        (raw().i32("layers.2.topk_indices", &[3, 2], &[0, -2, 3, 1, 0, 3]), "found -2"),
        (raw().f32("layers.2.topk_weights", &[2, 2], &[1.0; 4]), "expected [T = 3, K = 2]"),
        (raw().f32("layers.2.expert_mean_gate", &[4, 1], &[1.0; 4]), "expected [N = 4]"),
        (raw().f32("layers.2.reap_saliency", &[4], &[0.0, -1.0, 0.0, 0.0]), "found -1"),
        (raw().meta("num_experts", "8"), "experts: expected 8, found 4"),
        (raw().meta("layers", r#"[{"name": "layers.2", "tokens": 4}]"#), "expected 4, found 3"),
        (raw().meta("layers", r#"[{"name": "layers.2", "top_k": 3}]"#), "top-k: expected 3"),
        (
            Raw::default().f32("layers.2.moe_input", &[1, 1], &[1.0]),
            "experts: expected 1 to 8192, found 0",
        ),
        (
            Raw::default().f32("layers.2.router_logits", &[0, 1 << 40], &[]),
            "expected 1 to 8192, found 1099511627776",
        ),
        (
            Raw::default().i32("layers.2.topk_indices", &[1 << 40, 0], &[]).i32(
                "layers.2.counts",
                &[1],
                &[1],
            ),
            "K: expected 1 or more, found 0",
        ),
        (raw().without("layers.2.counts").without("layers.2.topk_indices"), "neither counts"),
        (Raw::default().i32("layers.2.counts", &[2], &[1, 1]), "observed tokens"),
    ];
    for (raw, message) in statistics {
        let error = raw.refusal();
        assert!(matches!(error.kind(), ErrorKind::Statistics { .. }), "{message}: {error}");
        assert!(error.to_string().contains(message), "{message}: {error}");
        assert_eq!(error.place().layer.as_deref(), Some("layers.2"), "{error}");
    }
    let fisher = raw()
        .f32("layers.2.fisher.up", &[4, 1, 2], &[0.0, 1.0, 2.0, -0.5, 0.0, 0.0, 0.0, 0.0])
        .f32("layers.2.fisher.down", &[4, 2, 1], &[0.0; 8]);
    let error = fisher.refusal();
    assert_eq!(error.place().tensor.as_deref(), Some("layers.2.fisher.up"), "{error}");
    assert_eq!(error.place().expert, Some(1));
}

#[test]
fn wrong_types_are_refused() {
    for raw in [
        raw().put("layers.2.counts", "F32", &[4], vec![0; 16]),
        raw().put("layers.2.counts", "U8", &[4], vec![0; 4]),
        raw().put("layers.2.router_logits", "I32", &[3, 4], vec![0; 48]),
        raw().put("layers.2.topk_weights", "F64", &[3, 2], vec![0; 48]),
    ] {
        let error = raw.refusal();
        assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
        assert!(error.place().tensor.is_some() && error.place().layer.is_some());
    }
}

#[test]
fn lying_and_truncated_files_are_refused() {
    let whole = raw().bytes();
    assert!(open(&whole).is_ok());
    for end in 0..whole.len() {
        let error = open(&whole[..end]).expect_err("truncated");
        assert!(matches!(error.kind(), ErrorKind::Format { .. }), "{end}: {error}");
    }
    let huge = [u64::MAX.to_le_bytes().to_vec(), whole[8..].to_vec()].concat();
    let text = String::from_utf8_lossy(&whole).into_owned();
    let lie = |from: &str, to: &str| {
        assert!(text.contains(from) && from.len() == to.len());
        let at = text.find(from).unwrap();
        [&whole[..at], to.as_bytes(), &whole[at + from.len()..]].concat()
    };
    let lies = [
        huge,
        [whole.clone(), vec![0]].concat(),
        lie("[3,4]", "[3,5]"),
        lie("\"data_offsets\":[0,48]", "\"data_offsets\":[0,47]"),
        lie("\"data_offsets\":[0,48]", "\"data_offsets\":[4,48]"),
        lie("\"F32\"", "\"F33\""),
        lie("{", "["),
    ];
    for (i, bytes) in lies.iter().enumerate() {
        let error = open(bytes).expect_err("a lie");
        assert!(matches!(error.kind(), ErrorKind::Format { .. }), "{i}: {error}");
        assert!(error.place().file.is_some());
    }
    let folder = tempfile::tempdir().unwrap();
    let absent = StatsFile::open(folder.path().join("absent")).unwrap_err();
    assert!(matches!(absent.kind(), ErrorKind::Io { .. }));
}

fn tensors(scale: f32) -> Vec<Expert> {
    let one = |e: usize| {
        let matrix = |r, c| Array2::from_shape_fn((r, c), |(i, j)| scale * (e + i * c + j) as f32);
        let (gate, up, down) = (matrix(3, 2), matrix(3, 2), matrix(2, 3));
        Expert::new(Some(Linear::new(gate)), up.into(), down.into(), Activation::Silu).unwrap()
    };
    (0..4).map(one).collect()
}

fn everything() -> RoutingStats {
    let samples = Samples {
        inputs: array![[1.0, -2.0], [0.1, 1e-30]],
        logits: Array2::from_shape_fn((2, 4), |(t, e)| 0.1 * t as f32 - 0.3 * e as f32),
        routing: Routing {
            experts: array![[0, 3], [3, 1]],
            weights: array![[0.7, 0.3], [1.0, 0.0]],
        },
        routed_output: Some(array![[0.5, 0.25], [-0.0, 3.0]]),
    };
    RoutingStats {
        tokens: 5_000_000_000,
        counts: vec![1, 4_000_000_000, 0, 4],
        logit_gram: Some(Array2::eye(4) * 0.1),
        router_mass: Some(vec![0.1, 0.2, 0.3, 1e300]),
        output_norm: Some(vec![0.5, 0.25, 0.0, 4.0]),
        reap: Some(vec![1.5, 0.25, 0.0, 4.0]),
        mean_output: Some(Array2::from_elem((4, 2), 0.3)),
        samples: Some(samples),
        gradients: Some(tensors(-0.1)),
        fisher: Some(tensors(0.1)),
    }
}

fn target(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("s.safetensors")
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let counts = RoutingStats::from_counts(vec![1, 2, 3], 3);
    let layers =
        BTreeMap::from([(layer(), everything()), ("encoder.layers.0".parse().unwrap(), counts)]);
    let metadata = BTreeMap::from([("model_type".to_owned(), "qwen3_moe".to_owned())]);
    write_stats(target(&dir), &layers, &metadata).unwrap();
    let first = std::fs::read(target(&dir)).unwrap();
    write_stats(target(&dir), &layers, &metadata).unwrap();
    assert_eq!(first, std::fs::read(target(&dir)).unwrap(), "the same bytes");
    let file = StatsFile::open(target(&dir)).unwrap();
    assert_eq!(file.model_type(), Some("qwen3_moe"));
    assert_eq!(file.tokens(), 5_000_000_000);
    for (id, stats) in &layers {
        assert_eq!(&file.layer(id, file.available(id)).unwrap(), stats);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "no partial file is left");
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let good = BTreeMap::from([(layer(), everything())]);
    write_stats(target(&dir), &good, &BTreeMap::new()).unwrap();
    let bad = RoutingStats { reap: Some(vec![f64::NAN; 4]), ..everything() };
    let error = write_stats(target(&dir), &BTreeMap::from([(layer(), bad)]), &BTreeMap::new());
    assert_eq!(error.unwrap_err().place().layer.as_deref(), Some("layers.2"));
    let file = StatsFile::open(target(&dir)).unwrap();
    assert!(file.layer(&layer(), Needs::REAP).is_ok());
}

#[test]
fn the_gram_has_the_same_bits_at_any_width() {
    let n = 600;
    let logits: Vec<f32> = (0..n * 7).map(|i| ((i * 7919) % 1013) as f32 / 506.5).collect();
    let chosen: Vec<i32> = (0..7).collect();
    let raw = Raw::default().f32("layers.2.router_logits", &[7, n], &logits).i32(
        "layers.2.topk_indices",
        &[7, 1],
        &chosen,
    );
    let file = raw.open().unwrap();
    let gram = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| file.layer(&layer(), Needs::LOGIT_GRAM)).unwrap().logit_gram.unwrap()
    };
    let one = gram(1);
    assert!([2, 8].iter().all(|&threads| gram(threads) == one));
}
