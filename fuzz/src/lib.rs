//! What the fuzz targets do with their input: a file of it, read through the crate's public doors.
//! Each gives a value or an error of the crate, never a panic.
//!
//! `tests/fuzz_corpus.rs` includes this file, so that the corpora are replayed by the same code.
//!
//! An input is a byte that chooses what the file lies beside, or its format, and then the file. A
//! safetensors file is given by its header alone: length and data are added, see [`file`].

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // A target fails by panicking.
#![allow(dead_code, missing_docs, unreachable_pub)] // The two crates that include it use parts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mcsmoe::Result;
use mcsmoe::calibrate::{StatsFile, statistics_from_json, statistics_to_json};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Model;
use mcsmoe::pipeline::{Output, PlanOptions, Recipe, plan};

#[path = "../../tests/support/checkpoints.rs"]
pub mod checkpoints;
mod seeds;

use checkpoints::Tiny;
pub use seeds::seeds;

/// Takes an input.
pub type Target = fn(&Ground, &[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 6] = [
    ("header", header),
    ("index", index),
    ("config", config),
    ("recipe", recipe),
    ("statistics", statistics),
    ("native", native),
];

/// Runs a target in a folder of its own, in memory where the system has such folders. It is left
/// behind: libFuzzer never returns.
pub fn fuzz(target: &str, input: &[u8]) {
    static GROUND: LazyLock<Ground> = LazyLock::new(|| {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Ground::new(&tempfile::tempdir_in(place).unwrap().keep())
    });
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    found.unwrap_or_else(|| panic!("there is no target {target}")).1(&GROUND, input);
}

/// A model without its data, which is all zeros.
struct Family {
    config: String,
    header: String,
}

/// Config and file of models whose forward pass is described too.
const FORWARD: [(&str, &[u8]); 3] = [
    (
        include_str!("../../tests/fixtures/forward/mixtral/config.json"),
        include_bytes!("../../tests/fixtures/forward/mixtral/model.safetensors"),
    ),
    (
        include_str!("../../tests/fixtures/forward/deepseek-v3/config.json"),
        include_bytes!("../../tests/fixtures/forward/deepseek-v3/model.safetensors"),
    ),
    (
        include_str!("../../tests/fixtures/forward/switch/config.json"),
        include_bytes!("../../tests/fixtures/forward/switch/model.safetensors"),
    ),
];

/// Folders whose files the targets replace.
pub struct Ground {
    dir: PathBuf,
    families: Vec<Family>,
    native: Family,
    source: Checkpoint,
}

impl Ground {
    /// Builds them in `dir`.
    pub fn new(dir: &Path) -> Self {
        let mut tinies: Vec<Tiny> = checkpoints::all().into_iter().map(|(_, tiny)| tiny).collect();
        let mut fp8 = checkpoints::deepseek();
        fp8.in_fp8([4, 4]);
        tinies.extend([fp8, checkpoints::gpt_oss_mxfp4()]);
        let mut families: Vec<Family> = tinies.iter().map(family).collect();
        families.extend(FORWARD.map(Family::of));
        for (i, family) in families.iter().enumerate() {
            family.write(&dir.join(i.to_string()));
        }
        let index = dir.join("index");
        checkpoints::mixtral().write_sharded(&index, 2);
        let native = seeds::native();
        native.write(&dir.join("native"));
        let source = Checkpoint::open(dir.join("0")).unwrap();
        let this = Self { dir: dir.to_owned(), families, native, source };
        // What is built opens: else no target would get further than the first refusal.
        let folders = (0..this.families.len()).map(|i| i.to_string());
        for name in folders.chain(["index".into(), "native".into()]) {
            open(&this.dir.join(&name)).map(drop).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        this
    }

    /// The folder of a family and its number.
    fn family(&self, choice: u8) -> PathBuf {
        let number = usize::from(choice.wrapping_sub(b'A')) % self.families.len();
        self.dir.join(number.to_string())
    }
}

impl Family {
    fn of((config, file): (&str, &[u8])) -> Self {
        let (length, rest) = file.split_first_chunk::<8>().unwrap();
        let header = &rest[..u64::from_le_bytes(*length) as usize];
        Self { config: config.into(), header: String::from_utf8(header.to_owned()).unwrap() }
    }

    fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), &self.config).unwrap();
        fs::write(dir.join("model.safetensors"), file(self.header.as_bytes())).unwrap();
    }
}

/// A tiny model's first layer.
fn family(tiny: &Tiny) -> Family {
    let later = ["layers.1.", "layers.2.", "blocks.1."];
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, raw) in &tiny.tensors {
        if later.iter().any(|layer| name.contains(layer)) {
            continue;
        }
        let (from, dtype) = (end, serde_json::to_value(raw.0).unwrap());
        end += raw.2.len();
        let tensor = serde_json::json!({
            "dtype": dtype, "shape": raw.1, "data_offsets": [from, end]
        });
        header.insert(name.clone(), tensor);
    }
    let config = tiny.config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    Family { config, header: serde_json::Value::Object(header).to_string() }
}

/// A safetensors file: the text of a header, and behind a NUL the beginning of its data, which is
/// filled up with zeros, or cut, to where the header says that it ends. Behind a byte 255 the rest
/// is taken as it is.
pub fn file(input: &[u8]) -> Vec<u8> {
    const MOST: u64 = 1 << 17;
    if let Some((255, rest)) = input.split_first() {
        return rest.to_owned();
    }
    let text = input.iter().position(|b| *b == 0).unwrap_or(input.len());
    let (header, data) = (&input[..text], input.get(text + 1..).unwrap_or_default());
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    let tensors = serde_json::from_slice::<serde_json::Map<_, serde_json::Value>>(header);
    let ends = tensors.into_iter().flatten();
    let end = ends.filter_map(|(_, t)| t.get("data_offsets")?.get(1)?.as_u64()).max();
    let size = end.filter(|end| *end <= MOST).map_or(data.len(), |end| end as usize);
    let data: Vec<u8> = data.iter().copied().chain(std::iter::repeat(0)).take(size).collect();
    bytes.extend(data);
    bytes
}

/// Opens a folder and reads all its layers in every way.
fn open(folder: &Path) -> Result<Checkpoint> {
    let source = Checkpoint::open(folder)?;
    for layer in source.layers() {
        source.read_merged(layer.id)?;
        source.read_factored(layer.id)?;
    }
    Ok(source)
}

/// The same, and describes its forward pass.
fn read_all(folder: &Path) {
    if let Ok(source) = open(folder).inspect_err(names_a_file) {
        let _ = Model::open(&source);
    }
}

/// What goes wrong with a file is told with its name.
fn names_a_file(error: &mcsmoe::Error) {
    assert!(error.place().file.is_some(), "it names no file: {error}");
}

fn header(ground: &Ground, input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let dir = ground.family(*choice);
    let path = dir.join("model.safetensors");
    fs::write(&path, file(rest)).unwrap();
    read_all(&dir);
    // Statistics are read by the same parser.
    let _ = StatsFile::open(&path).inspect_err(names_a_file);
}

fn index(ground: &Ground, input: &[u8]) {
    let dir = ground.dir.join("index");
    fs::write(dir.join("model.safetensors.index.json"), input).unwrap();
    read_all(&dir);
}

fn config(ground: &Ground, input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let dir = ground.family(*choice);
    fs::write(dir.join("config.json"), rest).unwrap();
    read_all(&dir);
}

/// The map in the config of a native folder, or its factors.
fn native(ground: &Ground, input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let (dir, whole) = (ground.dir.join("native"), &ground.native);
    let (name, bytes, before) = match choice % 2 {
        0 => ("model.safetensors", file(rest), file(whole.header.as_bytes())),
        _ => ("config.json", rest.to_owned(), whole.config.clone().into_bytes()),
    };
    fs::write(dir.join(name), bytes).unwrap();
    read_all(&dir);
    fs::write(dir.join(name), before).unwrap();
}

/// A recipe that is read describes a pipeline or is refused, and survives being written; what it
/// makes of a model can be planned or is refused.
fn recipe(ground: &Ground, input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let ending = ["toml", "yaml", "json"][usize::from(*choice % 3)];
    let path = ground.dir.join("recipe").with_extension(ending);
    fs::write(&path, rest).unwrap();
    let Ok(recipe) = Recipe::read(&path).inspect_err(names_a_file) else { return };
    let _ = recipe.builder().and_then(|builder| builder.build());
    let output = Output::new(recipe.export);
    let _ = plan(&ground.source, &recipe, &output, &PlanOptions::default());
    let Ok(text) = recipe.to_toml() else { return };
    let again = Recipe::from_toml(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(again.to_toml().unwrap(), text);
}

/// Statistics that are read can be written as JSON, and statistics from JSON can be read.
fn statistics(ground: &Ground, input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let [one, two] = ["one", "two"].map(|name| ground.dir.join(name).with_extension("safetensors"));
    let json = ground.dir.join("stats.json");
    let read = |path: &Path| -> Result<()> {
        let stats = StatsFile::open(path)?;
        stats.layers().iter().try_for_each(|id| stats.layer(id, stats.available(id)).map(drop))
    };
    if choice % 2 == 0 {
        fs::write(&one, file(rest)).unwrap();
        if read(&one).inspect_err(names_a_file).is_ok() {
            statistics_to_json(&one, &json).unwrap();
            statistics_from_json(&json, &two).unwrap();
        }
    } else {
        fs::write(&json, rest).unwrap();
        if statistics_from_json(&json, &one).inspect_err(names_a_file).is_ok() {
            read(&one).unwrap();
        }
    }
}
