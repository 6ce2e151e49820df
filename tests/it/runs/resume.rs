//! One call with text, and runs that are interrupted and resumed.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mcsmoe::calibrate::StatsFile;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{
    CalibrateOptions, Calibration, ExportChoice, Keep, LayerReport, Observer, Output, Phase,
    Recipe, Report, Tokens, calibrate, merge_then_compress,
};
use mcsmoe::stage::Needs;
use mcsmoe::{ErrorKind, Result};

use crate::support::child_of;
use crate::support::files::contents;
use crate::support::fixture;

fn tokens() -> Tokens {
    let window = |w: u32| (0..64).map(|i| (i * i * 17 + i * 5 + w * 131) % 2048).collect();
    Tokens::Windows((0..6).map(window).collect())
}

fn recipe(preset: &str, export: ExportChoice) -> Recipe {
    Recipe::preset(preset, Keep::Experts(4)).unwrap().export(export)
}

/// Three kinds of run: a file and a stock folder in one shard, text and a native folder in several,
/// text and a stock folder whose layers are fitted one behind the other.
fn setting(kind: usize) -> (Recipe, Calibration, Output) {
    if kind == 0 {
        let stats = fixture("mixtral-8e.stats.safetensors");
        return (
            recipe("fast", ExportChoice::Stock),
            Calibration::from(stats),
            Output::new(ExportChoice::Stock),
        );
    }
    if kind == 2 {
        let recipe = recipe("fast", ExportChoice::Stock);
        return (recipe, tokens().into(), Output::new(ExportChoice::Stock));
    }
    let output = Output { shard_bytes: 700_000, ..Output::new(ExportChoice::Native) };
    (recipe("m-smoe", ExportChoice::Native), tokens().into(), output)
}

fn run(kind: usize, target: &Path, resume: bool, observer: &dyn Observer) -> Result<Report> {
    let (recipe, calibration, output) = setting(kind);
    let source = Checkpoint::open(fixture("mixtral-8e"))?;
    let output = Output { resume, ..output };
    recipe
        .builder()?
        .build()?
        .run()
        .calibration(calibration.clone())
        .output(output)
        .observer(observer)
        .write(&source, target)
}

/// Panics at an event, which a run cannot catch, and pauses at each.
struct Bomb {
    events: AtomicUsize,
    last: usize,
    pause: Duration,
}

impl Bomb {
    fn at(event: usize) -> Self {
        Self { events: AtomicUsize::new(0), last: event, pause: Duration::ZERO }
    }

    /// For a kind of run. Layers that are redone at once are not worth marking where a run that
    /// fits them got to.
    fn of(kind: usize, event: usize) -> Self {
        Self { pause: Duration::from_millis(if kind == 2 { 20 } else { 0 }), ..Self::at(event) }
    }

    fn tick(&self) {
        std::thread::sleep(self.pause);
        assert!(self.events.fetch_add(1, Ordering::Relaxed) != self.last, "interrupted");
    }
}

impl Observer for Bomb {
    fn layer_started(&self, _: LayerId, _: Phase, _: usize, _: usize) {
        self.tick();
    }

    fn layer_finished(&self, _: &LayerReport) {
        self.tick();
    }
}

#[test]
fn text_gives_the_bytes_that_its_statistics_give() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, tokens) = (recipe("ream", ExportChoice::Stock), tokens());
    let source = fixture("mixtral-8e");
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let report = merge_then_compress(&source, tokens.clone(), &one, &recipe).unwrap();
    assert_eq!((report.tokens, report.layers.len()), (6 * 64, 4));

    let stats = dir.path().join("stats.safetensors");
    let model = Checkpoint::open(&source).unwrap();
    let options = CalibrateOptions::default();
    calibrate(&model, &tokens, Needs::OBSERVABLE).options(options).write(&stats).unwrap();
    assert_eq!(StatsFile::open(&stats).unwrap().model_type(), Some("mixtral"));
    let again = merge_then_compress(&source, &stats, &two, &recipe).unwrap();
    // Where the statistics come from is told by the reports, and differs.
    assert!(again.calibration.is_some() && report.calibration.is_none());
    assert_eq!(Report { calibration: None, ..again }, report);
    let mut folders = [contents(&one), contents(&two)];
    folders.iter_mut().for_each(|folder| drop(folder.remove("mcsmoe.json")));
    assert_eq!(folders[0], folders[1]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left");
}

#[test]
fn a_text_file_is_cut_drawn_and_run_through_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, source) = (recipe("reap", ExportChoice::Stock), fixture("mixtral-8e"));
    let merge = |text: Calibration, name: &str| {
        let target = dir.path().join(name);
        let report = merge_then_compress(&source, text, &target, &recipe);
        report.map(|report| (report.tokens, contents(&target)))
    };
    let path = fixture("text/calib");
    let first = merge(Calibration::text(&path, 64, 700, 1), "first").unwrap();
    assert_eq!(first.0, 640, "ten whole windows of 64 tokens");
    assert_eq!(merge(Calibration::text(&path, 64, 700, 1), "again").unwrap(), first);
    assert_ne!(merge(Calibration::text(&path, 64, 700, 2), "other").unwrap(), first);
    let error = merge(Calibration::text(path.join("none"), 64, 700, 1), "none").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn a_run_resumed_after_any_event_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [0, 1, 2] {
        let whole = dir.path().join(format!("whole-{kind}"));
        let counter = Bomb::of(kind, usize::MAX);
        let report = run(kind, &whole, false, &counter).unwrap();
        let events = counter.events.load(Ordering::Relaxed);
        assert!(events >= 12, "measure, merge and finish four layers: {events}");
        let expected = contents(&whole);
        for event in 0..events {
            let target = dir.path().join(format!("target-{kind}-{event}"));
            let broken = catch_unwind(AssertUnwindSafe(|| {
                run(kind, &target, true, &Bomb::of(kind, event)).unwrap();
            }));
            assert!(broken.is_err() && !target.exists());
            let counter = Bomb::of(kind, usize::MAX);
            assert_eq!(run(kind, &target, true, &counter).unwrap(), report);
            assert_eq!(contents(&target), expected, "interrupted at event {event}");
            // What was done is not done again.
            let again = counter.events.load(Ordering::Relaxed);
            assert!(event < 6 || again < events, "{event}: {again} of {events}");
            fs::remove_dir_all(target).unwrap();
        }
    }
}

#[test]
fn what_lies_damaged_on_the_disk_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, target) = (dir.path().join("whole"), dir.path().join("target"));
    let report = run(1, &whole, false, &Bomb::at(usize::MAX)).unwrap();
    let broken = catch_unwind(AssertUnwindSafe(|| run(1, &target, true, &Bomb::at(15)).map(drop)));
    assert!(broken.is_err());
    let partial = dir.path().join("target.partial");
    for (name, mut bytes) in contents(&partial) {
        if name.starts_with("model-00002") {
            bytes.truncate(bytes.len() / 2);
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(partial.join(name), bytes).unwrap();
        }
    }
    // A torn line and a forgotten scratch file.
    let journal = partial.join("mcsmoe.journal");
    let mut text = fs::read_to_string(&journal).unwrap();
    text.push_str("{\"layer\":[{\"layer\":\"layers.");
    fs::write(&journal, text).unwrap();
    fs::write(partial.join(".mcsmoe.1.0.scratch"), "left").unwrap();
    assert_eq!(run(1, &target, true, &Bomb::at(usize::MAX)).unwrap(), report);
    assert_eq!(contents(&target), contents(&whole));
}

#[test]
fn a_partial_folder_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    let broken = catch_unwind(AssertUnwindSafe(|| run(1, &target, true, &Bomb::at(13)).map(drop)));
    assert!(broken.is_err());
    let partial = dir.path().join("target.partial");
    let before = contents(&partial);
    let fails = |recipe: &Recipe, calibration: &Calibration, output: Output| {
        let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
        let pipeline = recipe.builder().unwrap().build().unwrap();
        let silent = Bomb::at(usize::MAX);
        let error = pipeline
            .run()
            .calibration(calibration.clone())
            .output(output)
            .observer(&silent)
            .write(&source, &target);
        let error = error.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Target { .. }), "{error}");
        assert_eq!(error.place().file.as_deref(), Some(&*partial.canonicalize().unwrap()));
        error.to_string()
    };
    let (recipe, calibration, output) = setting(1);
    assert!(fails(&recipe, &calibration, output).contains("left by another run: resume it"));
    let other = Recipe { seed: 9, ..recipe.clone() };
    assert!(fails(&other, &calibration, output.resuming()).contains("another recipe or export"));
    let smaller = Output { shard_bytes: 600_000, ..output };
    assert!(fails(&recipe, &calibration, smaller.resuming()).contains("another recipe or export"));
    let text = Tokens::Windows(vec![vec![1, 2, 3]]).into();
    assert!(fails(&recipe, &text, output.resuming()).contains("another statistics file or text"));
    assert_eq!(contents(&partial), before, "a refusal changes nothing");

    fs::remove_file(partial.join("mcsmoe.journal")).unwrap();
    assert!(fails(&recipe, &calibration, output.resuming()).contains("no journal"));
}

/// Slows a run down, so that kills hit many places.
struct Slow;

impl Observer for Slow {
    fn layer_started(&self, _: LayerId, _: Phase, _: usize, _: usize) {
        std::thread::sleep(Duration::from_millis(4));
    }
}

/// The child of the kill tests; `MCSMOE_RESUME_CHILD=KIND:TARGET`.
#[test]
#[ignore = "run by the kill tests"]
fn child() {
    let Ok(task) = std::env::var("MCSMOE_RESUME_CHILD") else { return };
    let (kind, target) = task.split_once(':').unwrap();
    run(kind.parse().unwrap(), Path::new(target), true, &Slow).unwrap();
}

/// Kills runs of each kind at `kills` random moments (fixed seed), and compares what is resumed.
fn kill(kind: usize, kills: u64) {
    let dir = tempfile::tempdir().unwrap();
    let spawn = |target: &Path| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &child_of(module_path!()), "--ignored", "--test-threads", "1"])
            .env("MCSMOE_RESUME_CHILD", format!("{kind}:{}", target.display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let whole = dir.path().join("whole");
    let start = Instant::now();
    assert!(spawn(&whole).wait().unwrap().success());
    let (mut length, expected) = (start.elapsed(), contents(&whole));
    let (mut random, mut hits) = (kind as u64 + 1, 0);
    while hits < kills {
        let target = dir.path().join("target");
        // Up to three kills of one run, then it may finish.
        for _ in 0..3 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
            let share = (random >> 40) as f64 / (1u64 << 24) as f64;
            let mut child = spawn(&target);
            std::thread::sleep(length.mul_f64(share));
            child.kill().unwrap();
            child.wait().unwrap();
            if target.exists() {
                // The machine is less busy than it was.
                length = length.mul_f64(0.8);
                break;
            }
            hits += 1;
        }
        if !target.exists() || target.join("mcsmoe.journal").exists() {
            assert!(spawn(&target).wait().unwrap().success());
        }
        assert!(contents(&target) == expected, "kind {kind} after {hits} kills");
        fs::remove_dir_all(target).unwrap();
    }
}

#[test]
fn killed_runs_resume_to_the_same_bytes() {
    kill(0, 5);
    kill(1, 5);
    kill(2, 5);
}

#[test]
#[ignore = "takes a minute"]
fn many_killed_runs_resume_to_the_same_bytes() {
    kill(0, 60);
    kill(1, 60);
    kill(2, 60);
}
