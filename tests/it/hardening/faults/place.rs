//! A small model with its statistics, and runs of three kinds.

use std::fs;
use std::path::{Path, PathBuf};

use mcsmoe::Result;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{
    Calibration, ExportChoice, Keep, Observer, Output, Recipe, Silent, Tokens, calibrate,
};
use mcsmoe::stage::Needs;

use crate::support::files::{Files, contents};

/// A place with a source, its statistics, and room for targets.
pub(super) struct Place(pub(super) tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/forward/mixtral");
        fs::create_dir(dir.path().join("source")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixtures.join(name), dir.path().join("source").join(name)).unwrap();
        }
        // Copied along, and larger than what the crate writes itself.
        fs::write(dir.path().join("source/tokenizer.json"), vec![b' '; 90_000]).unwrap();
        let source = Checkpoint::open(dir.path().join("source")).unwrap();
        let stats = dir.path().join("stats.safetensors");
        let options = Default::default();
        calibrate(&source, &tokens(), Needs::OBSERVABLE).options(options).write(&stats).unwrap();
        Self(dir)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

pub(super) fn tokens() -> Tokens {
    Tokens::Windows((0..8).map(|w| (0..32).map(|i| (i * 7 + w * 3) % 64).collect()).collect())
}

/// The number of kinds of [`run`].
pub(super) const KINDS: usize = 3;

/// Statistics and a stock folder; text, hidden states in a file, and a native folder in several
/// shards; text and layers that are fitted one behind the other.
pub(super) fn run(place: &Path, kind: usize, target: &Path, observer: &dyn Observer) -> Result<()> {
    let source = Checkpoint::open(place.join("source"))?;
    let (preset, export) = match kind {
        1 => ("m-smoe", ExportChoice::Native),
        _ => ("fast", ExportChoice::Stock),
    };
    let recipe = Recipe::preset(preset, Keep::Experts(2))?.export(export);
    let calibration = match kind {
        0 => Calibration::from(place.join("stats.safetensors")),
        _ => tokens().into(),
    };
    let (shard_bytes, memory) = if kind == 1 { (20_000, 0) } else { (1 << 30, 1 << 30) };
    let output = Output { shard_bytes, memory, ..Output::new(export).resuming() };
    let pipeline = recipe.builder()?.build()?;
    pipeline
        .run()
        .calibration(calibration.clone())
        .output(output)
        .observer(observer)
        .write(&source, target)
        .map(drop)
}

/// What an undisturbed run of a kind writes.
pub(super) fn undisturbed(place: &Place, kind: usize) -> Files {
    let target = place.path(&format!("whole-{kind}"));
    run(place.0.path(), kind, &target, &Silent).unwrap();
    contents(&target)
}
