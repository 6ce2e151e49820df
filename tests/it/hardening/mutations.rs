//! Damaged and hostile files: thousands of mutations of every format that is read, by a fixed seed.
//! Each gives a result or an error of the crate, never a panic; and what opens can be read.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use mcsmoe::Result;
use mcsmoe::calibrate::{StatsFile, statistics_from_json, statistics_to_json, write_stats};
use mcsmoe::checkpoint::{Checkpoint, LayerInfo};
use mcsmoe::forward::Model;
use mcsmoe::model::{LayerId, RoutingStats};
use mcsmoe::pipeline::{
    ExportChoice, Keep, Output, Recipe, Silent, Tokens, calibrate, merge_then_compress, verify,
};
use mcsmoe::stage::Needs;
use ndarray::Array2;

use crate::support::checkpoints;
use crate::support::checkpoints::{Tiny, layouts};
use crate::support::fixture;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

/// What hostile text is made of: numbers at the edges, and values of another kind.
const TOKENS: [&str; 16] = [
    "0",
    "-1",
    "1e999",
    "NaN",
    "null",
    "[]",
    "{}",
    "\"\"",
    "true",
    "4294967296",
    "9007199254740993",
    "18446744073709551615",
    "340282366920938463463374607431768211456",
    "0.5",
    "\\u0000",
    "[[[[[[[[",
];

/// One to three changes to the first `within` bytes.
fn mutated(bytes: &[u8], within: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let within = within.min(bytes.len()).max(1);
        let (a, length) = (random.below(within).min(bytes.len()), random.below(40));
        let b = (a + length).min(bytes.len());
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[a.min(within - 1)] ^= 1 << random.below(8),
            1 => drop(bytes.drain(a..b)),
            2 => {
                let copy = bytes[a..b].to_vec();
                bytes.splice(a..a, copy);
            }
            3 => bytes.truncate(a),
            // A number or a word becomes another value.
            _ => {
                let is = |c: &u8| c.is_ascii_digit() || *c == b'"';
                let Some(from) = bytes[a..].iter().position(is).map(|i| a + i) else { continue };
                let to = bytes[from + 1..].iter().position(|c| !c.is_ascii_alphanumeric());
                let to = to.map_or(bytes.len(), |i| from + 1 + i);
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(from..to, token.bytes());
            }
        }
    }
    bytes
}

/// Runs `read` on `rounds` mutations of the head of `file`, which is then put back.
fn attack(file: &Path, rounds: usize, head: usize, read: &dyn Fn() -> Result<()>) {
    let original = fs::read(file).unwrap();
    read().unwrap();
    let mut refused = 0;
    for seed in 0..rounds {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (seed as u64 + 1));
        let bytes = mutated(&original, head, &mut random);
        // A new file: ext4 sends one that is cut and written again to the disk at once.
        fs::remove_file(file).unwrap();
        fs::write(file, &bytes).unwrap();
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(result) => refused += usize::from(result.is_err()),
            Err(_) => panic!("{} panics at seed {seed}", file.display()),
        }
    }
    assert!(refused > rounds / 4, "{refused} of {rounds} refused: are the mutations read?");
    fs::write(file, original).unwrap();
}

fn copied(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// Opens a folder, reads all its layers, and describes its forward pass.
fn read_all(folder: &Path) -> Result<()> {
    let source = Checkpoint::open(folder)?;
    for layer in source.layers() {
        source.read_merged(layer.id)?;
    }
    Model::open(&source).map(drop)
}

#[test]
fn headers_and_configs_of_a_checkpoint() {
    for name in ["forward/mixtral", "forward/deepseek-v3", "forward/switch"] {
        let dir = copied(name);
        let read = || read_all(dir.path());
        attack(&dir.path().join("model.safetensors"), 600, 6000, &read);
        attack(&dir.path().join("config.json"), 600, usize::MAX, &read);
    }
}

#[test]
fn layouts_whose_experts_share_a_tensor_and_quantised_ones() {
    let mut blocks = checkpoints::deepseek();
    blocks.in_fp8([4, 4]);
    let folders: [(&str, Tiny); 8] = [
        ("fused", checkpoints::fused()),
        ("fused and transposed", layouts::qwen3_vl()),
        ("in a wrapper", layouts::llama4()),
        ("in turn, with biases", checkpoints::gpt_oss()),
        ("flat", layouts::dbrx()),
        ("other names", checkpoints::granite()),
        ("mxfp4", checkpoints::gpt_oss_mxfp4()),
        ("fp8", blocks),
    ];
    for (name, tiny) in folders {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path());
        let read = || {
            let source = Checkpoint::open(dir.path())?;
            let read = |layer: &LayerInfo| source.read_merged(layer.id).map(drop);
            source.layers().iter().try_for_each(read)
        };
        eprintln!("{name}");
        attack(&dir.path().join("model.safetensors"), 300, 6000, &read);
        attack(&dir.path().join("config.json"), 300, usize::MAX, &read);
    }
}

/// A file of one router `[8, 4]` of zeros and tensors without data.
fn hollow(model_type: &str, prefix: &str, router: &str, experts: &[(&str, [u64; 3], usize)]) {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": model_type, "hidden_size": 4, "num_experts": 8, "num_experts_per_tok": 2,
        "num_local_experts": 8, "num_hidden_layers": 1,
        "ffn_config": { "moe_num_experts": 8, "moe_top_k": 2 },
    });
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let tensor = |shape: &[u64], from: u64| {
        let data = [from, 128];
        serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": data })
    };
    let rows = tensor(&[8, 4], 0);
    header.insert(format!("{prefix}{router}"), rows);
    for (name, shape, axes) in experts {
        header.insert(format!("{prefix}{name}"), tensor(&shape[..*axes], 128));
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes().chain([0; 128]));
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let error = Checkpoint::open(dir.path()).map(drop).unwrap_err();
    assert!(matches!(error.kind(), mcsmoe::ErrorKind::Shape { .. }), "{model_type}: {error}");
    assert!(error.to_string().contains("no side of 0"), "{model_type}: {error}");
}

#[test]
fn experts_without_data_cannot_be_any_number() {
    let many = 1 << 40;
    let fused =
        |up, down| [("mlp.experts.gate_up_proj", up, 3), ("mlp.experts.down_proj", down, 3)];
    let (qwen, oss, dbrx) = ("model.layers.0.", "model.layers.0.", "transformer.blocks.0.");
    let tensors = fused([many, 0, 4], [many, 4, 0]);
    hollow("qwen3_moe", qwen, "mlp.gate.weight", &tensors);
    let tensors = fused([many, 4, 0], [many, 0, 4]);
    hollow("gpt_oss", oss, "mlp.router.weight", &tensors);
    let tensors = fused([0, 4, u64::MAX], [0, 1 << 63, 4]);
    hollow("gpt_oss", oss, "mlp.router.weight", &tensors);
    let flat = ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"];
    let tensors = flat.map(|name| (name, [0, 4, 0], 2));
    hollow("dbrx", dbrx, "ffn.router.layer.weight", &tensors);
}

#[test]
fn indexes() {
    let dir = copied("forward/mixtral");
    let source = Checkpoint::open(dir.path()).unwrap();
    let name = "model-00001-of-00001.safetensors";
    let map: BTreeMap<String, &str> =
        source.tensors().map(|(t, ..)| (t.to_owned(), name)).collect();
    drop(source);
    fs::rename(dir.path().join("model.safetensors"), dir.path().join(name)).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let text = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    fs::write(&index, text.to_string()).unwrap();
    attack(&index, 600, usize::MAX, &|| read_all(dir.path()));
    // A name that leads out of the folder is no file of the checkpoint, even if it is there.
    let there = dir.path().with_extension("safetensors");
    fs::copy(dir.path().join(name), &there).unwrap();
    let beside = format!("../{}", there.file_name().unwrap().to_string_lossy());
    for outside in [beside.as_str(), &there.to_string_lossy()] {
        fs::write(&index, text.to_string().replace(name, outside)).unwrap();
        let error = read_all(dir.path()).unwrap_err();
        assert!(error.place().file.as_deref() == Some(&*index), "{error}");
    }
    fs::remove_file(there).unwrap();
    for outside in ["a/../../outside.safetensors", "..", "", "."] {
        fs::write(&index, text.to_string().replace(name, outside)).unwrap();
        assert!(read_all(dir.path()).is_err(), "{outside}");
    }
}

#[test]
fn native_folders_and_their_manifests() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (copied("forward/mixtral"), dir.path().join("native"));
    let window = |w: u32| (0..32).map(|i| (i * 7 + w * 3) % 32).collect();
    let tokens = Tokens::Windows((0..8).map(window).collect());
    let recipe = Recipe::preset("mc-smoe", Keep::Fraction(0.5)).unwrap();
    let mut recipe = recipe.export(ExportChoice::Native);
    recipe.compress = Some(mcsmoe::pipeline::CompressChoice::Svd { rank: 2 });
    merge_then_compress(source.path(), tokens, &target, &recipe).unwrap();
    let read = || read_all(&target);
    attack(&target.join("config.json"), 900, usize::MAX, &read);
    attack(&target.join("model.safetensors"), 600, 6000, &read);
    let findings = || {
        let found = verify(&target, Some(source.path()))?;
        let ok = found.is_clean();
        if ok { Ok(()) } else { Err(mcsmoe::ErrorKind::Target { reason: "finding".into() }.into()) }
    };
    attack(&target.join("mcsmoe.json"), 100, usize::MAX, &findings);
}

#[test]
fn statistics() {
    let dir = tempfile::tempdir().unwrap();
    let (file, json) = (dir.path().join("stats.safetensors"), dir.path().join("stats.json"));
    let tokens = Tokens::Windows(vec![(0..30).collect(), (2..32).collect()]);
    let model = Checkpoint::open(fixture("forward/mixtral")).unwrap();
    calibrate(&model, &tokens, Needs::OBSERVABLE).options(Default::default()).write(&file).unwrap();
    attack(&file, 900, 6000, &|| {
        let stats = StatsFile::open(&file)?;
        stats.layers().iter().try_for_each(|id| stats.layer(id, stats.available(id)).map(drop))
    });

    let small = dir.path().join("small.safetensors");
    let stats = RoutingStats {
        logit_gram: Some(Array2::eye(3)),
        router_mass: Some(vec![1.0, 0.5, 0.0]),
        ..RoutingStats::from_counts(vec![4, 2, 1], 5)
    };
    let layers = BTreeMap::from([(LayerId::causal(0), stats)]);
    write_stats(&small, &layers, &BTreeMap::new()).unwrap();
    statistics_to_json(&small, &json).unwrap();
    let read = || statistics_from_json(&json, &dir.path().join("again.safetensors"));
    attack(&json, 600, usize::MAX, &read);
}

#[test]
fn recipes() {
    let dir = tempfile::tempdir().unwrap();
    for preset in Recipe::PRESETS {
        let recipe = Recipe::preset(preset, Keep::Experts(4)).unwrap();
        let (toml, json) = (dir.path().join("recipe.toml"), dir.path().join("recipe.json"));
        fs::write(&toml, recipe.to_toml().unwrap()).unwrap();
        fs::write(&json, serde_json::to_string(&recipe).unwrap()).unwrap();
        for file in [toml, json] {
            attack(&file, 300, usize::MAX, &|| Recipe::read(&file)?.builder()?.build().map(drop));
        }
    }
}

#[test]
fn journals() {
    let dir = tempfile::tempdir().unwrap();
    let (source, stats) = (fixture("mixtral-8e"), fixture("mixtral-8e.stats.safetensors"));
    let (source, stats) = (Checkpoint::open(source).unwrap(), StatsFile::open(stats).unwrap());
    let recipe = Recipe::preset("reap", Keep::Experts(4)).unwrap();
    let pipeline = recipe.export(ExportChoice::Native).builder().unwrap().build().unwrap();
    let output = Output::new(ExportChoice::Native).resuming();
    let target = dir.path().join("target");
    let run = || {
        pipeline
            .run()
            .calibration(stats.path())
            .output(output)
            .observer(&Silent)
            .write(&source, &target)
            .map(drop)
    };
    // A run is stopped by a folder in the target's place, at the very end.
    let journal = dir.path().join("target.partial/mcsmoe.journal");
    struct InTheWay(PathBuf);
    impl mcsmoe::pipeline::Observer for InTheWay {
        fn layer_finished(&self, _: &mcsmoe::pipeline::LayerReport) {
            fs::create_dir_all(self.0.join("full")).unwrap();
        }
    }
    let way = InTheWay(target.clone());
    pipeline
        .run()
        .calibration(stats.path())
        .output(output)
        .observer(&way)
        .write(&source, &target)
        .unwrap_err();
    fs::remove_dir_all(&target).unwrap();
    let left = fs::read(&journal).unwrap();
    run().unwrap();
    let read = |name: &str| fs::read(target.join(name)).unwrap();
    let expected = read("model.safetensors");
    for seed in 0..12 {
        fs::remove_dir_all(&target).unwrap();
        let partial = dir.path().join("target.partial");
        fs::create_dir(&partial).unwrap();
        let mut random = Random(0x517c_c1b7_2722_0a95 ^ (seed + 1));
        fs::write(&journal, mutated(&left, usize::MAX, &mut random)).unwrap();
        let done = catch_unwind(AssertUnwindSafe(run));
        match done.unwrap_or_else(|_| panic!("a journal panics at seed {seed}")) {
            Ok(()) => assert!(fs::read(target.join("model.safetensors")).unwrap() == expected),
            Err(_) => {
                fs::remove_dir_all(&partial).unwrap();
                run().unwrap();
            }
        }
    }
}
