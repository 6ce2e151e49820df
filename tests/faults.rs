//! Writes that fail and sources that change under a run: a typed error that names the file, and a
//! target that is absent, can be resumed to the bytes of an undisturbed run, or is complete.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use mcsmoe::calibrate::{statistics_from_json, statistics_to_json};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{
    Calibration, ExportChoice, Keep, Observer, Output, Phase, Recipe, Silent, Tokens,
    calibrate_to_file,
};
use mcsmoe::stage::Needs;
use mcsmoe::{ErrorKind, Result};

/// A place with a source, its statistics, and room for targets.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
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
        calibrate_to_file(&source, &tokens(), Needs::OBSERVABLE, &options, &stats).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn tokens() -> Tokens {
    Tokens::Windows((0..8).map(|w| (0..32).map(|i| (i * 7 + w * 3) % 64).collect()).collect())
}

/// The number of kinds of [`run`].
const KINDS: usize = 3;

/// Statistics and a stock folder; text, hidden states in a file, and a native folder in several
/// shards; text and layers that are fitted one behind the other.
fn run(place: &Path, kind: usize, target: &Path, observer: &dyn Observer) -> Result<()> {
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
    pipeline.run_calibrated(&source, &calibration, target, &output, observer).map(drop)
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |e: std::io::Result<fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())
    };
    fs::read_dir(folder).unwrap().map(entry).collect()
}

/// What an undisturbed run of a kind writes.
fn undisturbed(place: &Place, kind: usize) -> BTreeMap<String, Vec<u8>> {
    let target = place.path(&format!("whole-{kind}"));
    run(place.0.path(), kind, &target, &Silent).unwrap();
    contents(&target)
}

/// What a child does: a run of a kind, or, as kinds of their own, what writes statistics.
fn work(place: &Path, kind: usize, target: &Path) -> Result<()> {
    let source = place.join("source");
    match kind {
        3 => {
            let (source, options) = (Checkpoint::open(source)?, Default::default());
            calibrate_to_file(&source, &tokens(), Needs::OBSERVABLE, &options, target)
        }
        4 => statistics_to_json(&place.join("stats.safetensors"), target),
        5 => statistics_from_json(&place.join("stats.json"), target),
        _ => run(place, kind, target, &Silent),
    }
}

/// The child; `MCSMOE_FAULT_CHILD=KIND:PLACE:TARGET`. It tells how it went, and the file.
#[test]
#[ignore = "run by the other tests"]
fn child() {
    let Ok(task) = std::env::var("MCSMOE_FAULT_CHILD") else { return };
    let [kind, place, target] = task.split(':').collect::<Vec<_>>()[..] else { panic!("{task}") };
    match work(Path::new(place), kind.parse().unwrap(), Path::new(target)) {
        Ok(()) => println!("\noutcome|done"),
        Err(error) => {
            let file = error.place().file.as_ref().map(|file| file.display().to_string());
            println!("\noutcome|{}|{error}", file.unwrap_or_default());
        }
    }
}

/// Runs a child by `command`, which begins with this program: nothing, or the file and the error.
fn spawn(
    mut command: Command,
    place: &Place,
    kind: usize,
    target: &Path,
) -> Option<(PathBuf, String)> {
    let task = format!("{kind}:{}:{}", place.0.path().display(), target.display());
    command.args(["--exact", "child", "--ignored", "--nocapture", "--test-threads", "1"]);
    let output = command.env("MCSMOE_FAULT_CHILD", task).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("outcome|"));
    let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    let (file, error) = line.split_once('|')?;
    Some((file.into(), error.into()))
}

/// This program, which can write no file beyond `blocks` of 512 bytes: POSIX counts in them.
fn limited(blocks: usize) -> Command {
    let mut shell = Command::new("sh");
    let script = r#"trap "" XFSZ; ulimit -f "$1"; shift; exec "$@""#;
    shell.args(["-c", script, "sh", &blocks.to_string()]).arg(std::env::current_exe().unwrap());
    shell
}

/// Limits from nothing on: every block at first, then in growing steps.
fn limits() -> impl Iterator<Item = usize> {
    (0..16).chain((0..).map(|i| (16.0 * 1.2f64.powi(i)) as usize))
}

#[test]
fn a_write_that_fails_names_its_file_and_can_be_resumed() {
    let place = Place::new();
    for kind in 0..KINDS {
        let expected = undisturbed(&place, kind);
        let mut files = BTreeSet::new();
        for blocks in limits() {
            let target = place.path("target");
            let Some((file, error)) = spawn(limited(blocks), &place, kind, &target) else {
                assert!(contents(&target) == expected, "kind {kind} at {blocks} blocks");
                fs::remove_dir_all(&target).unwrap();
                break;
            };
            assert!(error.contains("File too large") || error.contains("os error 27"), "{error}");
            assert!(file.starts_with(place.path("target.partial")), "{error}");
            files.insert(file.file_name().unwrap().to_owned());
            assert!(!target.exists(), "kind {kind} at {blocks} blocks: {error}");
            run(place.0.path(), kind, &target, &Silent).unwrap();
            assert!(contents(&target) == expected, "kind {kind} after {blocks} blocks: {error}");
            fs::remove_dir_all(&target).unwrap();
        }
        assert!(files.len() >= 4, "kind {kind}: {files:?}");
    }
}

#[test]
fn statistics_are_whole_or_as_they_were() {
    let place = Place::new();
    let json = place.path("stats.json");
    statistics_to_json(&place.path("stats.safetensors"), &json).unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    let target = place.path("folder/statistics");
    for kind in 3..6 {
        fs::write(&target, "as it was").unwrap();
        let mut failed = 0;
        for blocks in limits() {
            let Some((file, error)) = spawn(limited(blocks), &place, kind, &target) else { break };
            assert!(file.file_name() == target.file_name(), "{error}");
            let found = contents(&place.path("folder"));
            assert!(found.len() == 1 && found["statistics"] == b"as it was", "{error}");
            failed += 1;
        }
        assert!(failed > 2, "kind {kind}");
        let (kind, again) = (format!("{kind}"), place.path("again"));
        work(place.0.path(), kind.parse().unwrap(), &again).unwrap();
        assert!(fs::read(&again).unwrap() == fs::read(&target).unwrap());
    }
}

/// Panics when the second layer has been merged, which leaves a partial folder.
struct Bomb;

impl Observer for Bomb {
    fn layer_started(&self, _: LayerId, phase: Phase, at: usize, _: usize) {
        assert!(phase != Phase::Merge || at == 0, "interrupted");
    }
}

/// A partial folder of an interrupted run of a kind.
fn interrupted(place: &Place, kind: usize) -> (PathBuf, PathBuf) {
    let [target, partial] = ["target", "target.partial"].map(|name| place.path(name));
    let run = || run(place.0.path(), kind, &target, &Bomb);
    let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    assert!(died.is_err() && partial.is_dir() && !target.exists());
    (target, partial)
}

#[test]
fn what_stands_in_the_way_of_a_file_is_named_and_can_be_cleared() {
    let place = Place::new();
    for kind in 0..KINDS {
        let expected = undisturbed(&place, kind);
        // A folder under the name of every file that is still to be written: no user may open that.
        for name in expected.keys() {
            let (target, partial) = interrupted(&place, kind);
            let way = partial.join(name);
            let _ = fs::remove_file(&way);
            fs::create_dir_all(way.join("full")).unwrap();
            let error = run(place.0.path(), kind, &target, &Silent).unwrap_err();
            assert_eq!(error.place().file.as_ref(), Some(&way), "{error}");
            assert!(matches!(error.kind(), ErrorKind::Io { .. }) && !target.exists(), "{error}");
            fs::remove_dir_all(&way).unwrap();
            run(place.0.path(), kind, &target, &Silent).unwrap();
            assert!(contents(&target) == expected, "kind {kind}, {name}");
            fs::remove_dir_all(&target).unwrap();
        }
    }
    // A file where a folder must be.
    let below = place.path("stats.safetensors").join("target");
    let error = run(place.0.path(), 0, &below, &Silent).unwrap_err();
    let partial = below.with_file_name("target.partial");
    assert_eq!(error.place().file.as_ref(), Some(&partial), "{error}");
}

/// This program as a user who owns nothing here: another one for root, whom no mode keeps out.
fn unprivileged(place: &Place) -> Command {
    let program = std::env::current_exe().unwrap();
    if fs::metadata(place.0.path()).unwrap().uid() != 0 {
        return Command::new(program);
    }
    // Where that user can reach it.
    let copy = place.path("program");
    if !copy.exists() {
        fs::copy(program, &copy).unwrap();
    }
    let mut command = Command::new(copy);
    command.uid(65_534).gid(65_534);
    command
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn folders_that_may_not_be_written_are_refused() {
    let place = Place::new();
    mode(place.0.path(), 0o755);
    let refused = |target: &Path, file: &Path| {
        let (found, error) = spawn(unprivileged(&place), &place, 0, target).unwrap();
        assert!(error.contains("os error 13") && found == file, "{error}");
        assert!(!target.exists());
    };
    let parent = place.path("parent");
    fs::create_dir(&parent).unwrap();
    mode(&parent, 0o555);
    refused(&parent.join("target"), &parent.join("target.partial"));
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
    mode(&parent, 0o755);

    let expected = undisturbed(&place, 0);
    let (target, partial) = interrupted(&place, 0);
    let before = contents(&partial);
    before.keys().for_each(|name| mode(&partial.join(name), 0o444));
    mode(&partial, 0o555);
    refused(&target, &partial.join("mcsmoe.journal"));
    mode(&partial, 0o755);
    assert!(contents(&partial) == before, "a refusal changes nothing");
    before.keys().for_each(|name| mode(&partial.join(name), 0o644));
    run(place.0.path(), 0, &target, &Silent).unwrap();
    assert!(contents(&target) == expected);
}

/// Does something to a file when layer `at` begins a phase.
struct Meddler<'a>(Phase, usize, Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>);

impl<'a> Meddler<'a> {
    fn new(phase: Phase, at: usize, deed: impl FnOnce() + Send + 'a) -> Self {
        Self(phase, at, Mutex::new(Some(Box::new(deed))))
    }
}

impl Observer for Meddler<'_> {
    fn layer_started(&self, _: LayerId, phase: Phase, at: usize, _: usize) {
        if (phase, at) == (self.0, self.1)
            && let Some(deed) = self.2.lock().unwrap().take()
        {
            deed();
        }
    }
}

#[test]
fn a_source_that_changes_between_two_layers_is_told() {
    let place = Place::new();
    let shard = place.path("source/model.safetensors");
    let (bytes, time) = (fs::read(&shard).unwrap(), fs::metadata(&shard).unwrap().modified());
    let open = || fs::File::options().write(true).open(&shard).unwrap();
    let later = *time.as_ref().unwrap() + std::time::Duration::from_secs(5);
    let cut = || open().set_len(bytes.len() as u64 / 2).unwrap();
    let rewrite = || {
        let file = open();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 999], 9999).unwrap();
        file.set_modified(later).unwrap();
    };
    for kind in 0..KINDS {
        let expected = undisturbed(&place, kind);
        let deeds = [(Phase::Measure, true), (Phase::Measure, false), (Phase::Merge, false)];
        for (phase, cuts) in deeds {
            // Nothing else reads when a layer begins to be measured; another thread may copy when
            // one begins to be merged, and a file that is cut then ends the process.
            let target = place.path("target");
            let deed = || if cuts { cut() } else { rewrite() };
            let observer = Meddler::new(phase, 1, deed);
            let error = run(place.0.path(), kind, &target, &observer).unwrap_err();
            assert!(observer.2.lock().unwrap().is_none(), "nothing was done to the file");
            let ErrorKind::Changed { expected: was, found } = error.kind() else {
                panic!("{error}")
            };
            assert!(was.starts_with(&format!("{} bytes, written ", bytes.len())), "{error}");
            assert!(cuts == found.starts_with(&format!("{} bytes", bytes.len() / 2)), "{error}");
            assert_eq!(error.place().file.as_deref(), Some(&*shard), "{error}");
            assert!(!target.exists());
            // With the file as it was the run goes on.
            fs::write(&shard, &bytes).unwrap();
            open().set_modified(*time.as_ref().unwrap()).unwrap();
            run(place.0.path(), kind, &target, &Silent).unwrap();
            assert!(contents(&target) == expected, "kind {kind}, {phase}");
            fs::remove_dir_all(&target).unwrap();
        }
        // A file that is replaced stays mapped as it was.
        let target = place.path("target");
        let other = place.path("other");
        fs::write(&other, "another file").unwrap();
        let observer = Meddler::new(Phase::Measure, 1, || fs::rename(&other, &shard).unwrap());
        run(place.0.path(), kind, &target, &observer).unwrap();
        assert!(contents(&target) == expected, "kind {kind}, replaced");
        fs::remove_dir_all(&target).unwrap();
        fs::write(&shard, &bytes).unwrap();
        open().set_modified(*time.as_ref().unwrap()).unwrap();
    }
}
