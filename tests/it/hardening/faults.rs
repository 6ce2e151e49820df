//! Writes that fail and sources that change under a run: a typed error that names the file, and a
//! target that is absent, can be resumed to the bytes of an undisturbed run, or is complete.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mcsmoe::calibrate::{statistics_from_json, statistics_to_json};
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{Observer, Phase, Silent, calibrate};
use mcsmoe::stage::Needs;
use mcsmoe::{ErrorKind, Result};

mod changed;
mod place;

use crate::support::child_of;
use crate::support::files::contents;
use place::{KINDS, Place, run, tokens, undisturbed};

/// Kinds of a child from here on are runs on a disk of its own.
const FULL: usize = 10;

/// A run on a disk that may be too small; if it is, once more when it has grown.
fn fill(place: &Path, kind: usize, target: &Path) -> Result<()> {
    let first = run(place, kind, target, &Silent);
    if first.is_err() {
        assert!(!target.exists());
        let mut grow = Command::new("mount");
        grow.args(["-o", "remount,size=64m"]).arg(target.parent().unwrap());
        assert!(grow.status().unwrap().success());
        run(place, kind, target, &Silent).unwrap();
    }
    assert!(contents(target) == contents(&place.join(format!("whole-{kind}"))));
    first
}

/// What a child does: a run of a kind, or, as kinds of their own, what writes statistics.
fn work(place: &Path, kind: usize, target: &Path) -> Result<()> {
    let source = place.join("source");
    match kind {
        3 => {
            let (source, options) = (Checkpoint::open(source)?, Default::default());
            calibrate(&source, &tokens(), Needs::OBSERVABLE).options(options).write(target)
        }
        4 => statistics_to_json(&place.join("stats.safetensors"), target),
        5 => statistics_from_json(&place.join("stats.json"), target),
        FULL.. => fill(place, kind - FULL, target),
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
    command.args(["--exact", &child_of(module_path!())]);
    command.args(["--ignored", "--nocapture", "--test-threads", "1"]);
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
        assert!(files.len() >= 3, "kind {kind}: {files:?}");
    }
}

/// This program in a namespace where `disk` has so many pages of 4096 bytes.
fn on_a_small_disk(disk: &Path, pages: usize) -> Command {
    let mut shell = Command::new("unshare");
    let script = r#"mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@""#;
    shell.args(["-rm", "sh", "-c", script, "sh", &(4096 * pages).to_string()]);
    shell.arg(disk).arg(std::env::current_exe().unwrap());
    shell
}

#[test]
#[ignore = "mounts a file system in a namespace: needs root, or Linux that lets others do so"]
fn a_run_on_a_full_disk_names_its_file_and_can_be_resumed() {
    let place = Place::new();
    let disk = place.path("disk");
    fs::create_dir(&disk).unwrap();
    for kind in 0..KINDS {
        undisturbed(&place, kind);
        let mut files = BTreeSet::new();
        for pages in 1.. {
            let command = on_a_small_disk(&disk, pages);
            let outcome = spawn(command, &place, FULL + kind, &disk.join("target"));
            let Some((file, error)) = outcome else { break };
            assert!(error.contains("os error 28"), "{error}");
            assert!(file.starts_with(disk.join("target.partial")), "{error}");
            files.insert(file.file_name().unwrap().to_owned());
        }
        eprintln!("kind {kind}: {files:?}");
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
        // By another process: a file that this one holds open for writing while another test
        // starts a child is "busy" for as long as the child has not become another program.
        assert!(Command::new("cp").arg(program).arg(&copy).status().unwrap().success());
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
