//! Every preset in every export: a process that dies in the middle of a run or at its end leaves
//! what a second run completes to the bytes of an undisturbed one.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use mcsmoe::Result;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{ExportChoice, LayerReport, Observer, Output, Phase, Recipe, Tokens};

use crate::support::child_of;
use crate::support::files::contents;
use crate::support::fixture;

const EXPORTS: [ExportChoice; 3] =
    [ExportChoice::Stock, ExportChoice::Native, ExportChoice::Expanded];

/// Pairs that no run may write: what is dropped has no copy, and a size is met by factors.
const REFUSED: [(&str, ExportChoice); 3] = [
    ("reap", ExportChoice::Expanded),
    ("mc-smoe-budget", ExportChoice::Stock),
    ("mc-smoe-budget", ExportChoice::Expanded),
];

/// Counts events; at the last one the process dies, as if it were killed.
struct Death {
    events: AtomicUsize,
    last: usize,
}

impl Death {
    fn at(last: usize) -> Self {
        Self { events: AtomicUsize::new(0), last }
    }

    fn event(&self) {
        if self.events.fetch_add(1, Ordering::Relaxed) == self.last {
            std::process::abort();
        }
    }
}

impl Observer for Death {
    fn layer_started(&self, _: LayerId, _: Phase, _: usize, _: usize) {
        self.event();
    }

    fn layer_finished(&self, _: &LayerReport) {
        self.event();
    }
}

fn run(preset: &str, export: ExportChoice, target: &Path, observer: &dyn Observer) -> Result<()> {
    let source = Checkpoint::open(fixture("forward/mixtral"))?;
    let window = |w: u32| (0..32).map(|i| (i * 7 + i * i * 3 + w * 5) % 64).collect();
    let tokens = Tokens::Windows((0..6).map(window).collect());
    // The preset's rank is more than the layers of this model have.
    let compress = if preset == "mc-smoe" { "[compress]\nrank = 4\n" } else { "" };
    let text = format!("preset = \"{preset}\"\nkeep.experts = 2\n{compress}");
    let recipe = Recipe::from_toml(&text)?.export(export);
    let output = Output::new(export).resuming();
    let pipeline = recipe.builder()?.build()?;
    pipeline
        .run()
        .calibration(tokens)
        .output(output)
        .observer(observer)
        .write(&source, target)
        .map(drop)
}

/// The process that dies; `MCSMOE_MATRIX_CHILD=PRESET:EXPORT:EVENT:TARGET`.
#[test]
#[ignore = "run by the other test"]
fn child() {
    let Ok(task) = std::env::var("MCSMOE_MATRIX_CHILD") else { return };
    let [preset, export, event, target] = task.splitn(4, ':').collect::<Vec<_>>()[..] else {
        panic!("{task}")
    };
    let export = EXPORTS[export.parse::<usize>().unwrap()];
    run(preset, export, Path::new(target), &Death::at(event.parse().unwrap())).unwrap();
}

#[test]
fn a_killed_run_of_every_preset_and_export_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for &preset in Recipe::PRESETS {
        for (i, export) in EXPORTS.into_iter().enumerate() {
            let counter = Death::at(usize::MAX);
            let whole = dir.path().join(format!("{preset}-{i}"));
            let done = run(preset, export, &whole, &counter);
            if REFUSED.contains(&(preset, export)) {
                assert!(done.is_err() && !whole.exists(), "{preset}, {export:?}");
                continue;
            }
            done.unwrap();
            let events = counter.events.into_inner();
            assert!(events >= 4, "{preset}, {export:?}: {events} events");
            for event in [events / 2, events - 1] {
                let target = dir.path().join(format!("{preset}-{i}-{event}"));
                let mut child = Command::new(std::env::current_exe().unwrap());
                child.args(["--exact", &child_of(module_path!()), "--ignored"]);
                let task = format!("{preset}:{i}:{event}:{}", target.display());
                let status = child.env("MCSMOE_MATRIX_CHILD", task).stdout(Stdio::null()).status();
                let partial = target.with_file_name(format!("{preset}-{i}-{event}.partial"));
                let place = format!("{preset}, {export:?}, event {event} of {events}");
                assert!(!status.unwrap().success() && !target.exists(), "{place}");
                assert!(partial.is_dir(), "{place}");
                run(preset, export, &target, &Death::at(usize::MAX)).unwrap();
                assert!(contents(&target) == contents(&whole), "{place}");
            }
        }
    }
}
