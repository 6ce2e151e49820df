//! The command-line tool: exit codes, JSON, resuming, dry runs, parts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::files::contents;
use crate::support::fixture;

fn tool(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcsmoe"));
    args.iter().for_each(|arg| {
        command.arg(arg);
    });
    command
}

/// Runs the tool; its exit code and both outputs.
fn run(args: &[&dyn AsRef<std::ffi::OsStr>]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = tool(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Runs the tool with `--json`, expects success, parses.
fn json(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Value {
    let with: Vec<&dyn AsRef<std::ffi::OsStr>> = [&[&"--json" as _], args].concat();
    let (code, out, err) = run(&with);
    assert_eq!((code, &*err), (0, ""), "{out}");
    serde_json::from_str(&out).unwrap()
}

/// The same files with the same bytes; tells the names of those that differ.
fn assert_same(one: &Path, two: &Path) {
    let (one, two) = (contents(one), contents(two));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    let differ: Vec<_> = one.keys().filter(|name| one[*name] != two[*name]).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

struct Places {
    dir: tempfile::TempDir,
    model: PathBuf,
    stats: PathBuf,
    text: PathBuf,
}

impl Places {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            model: fixture("mixtral-8e"),
            stats: fixture("mixtral-8e.stats.safetensors"),
            text: fixture("text/calib"),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn a_model_is_inspected_merged_verified_and_reported() {
    let p = Places::new();
    let target = p.at("merged");
    let found = json(&[&"inspect", &p.model, &"--tensors"]);
    assert_eq!((&found["family"], &found["parameters"]), (&"mixtral".into(), &3_871_872.into()));
    assert_eq!(found["layers"].as_array().unwrap().len(), 4);
    let bytes: u64 =
        found["tensors"].as_array().unwrap().iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(found["bytes"], bytes);

    let done = json(&[&"merge", &p.model, &p.stats, &target, &"--keep", &"50%"]);
    assert_eq!(done["report"]["experts"]["after"], 16);
    let found = json(&[&"verify", &target, &"--source", &p.model]);
    assert_eq!(found["account"]["router"], 4);
    assert!(found["tensors"].as_array().unwrap().is_empty(), "only when asked for");
    let report = json(&[&"report", &target]);
    assert_eq!(report, done["report"]);
    let (code, text, _) = run(&[&"report", &target]);
    assert!(code == 0 && text.contains("expert bytes: 6.3 MB → 3.1 MB (50.0% saved)"), "{text}");

    let score = json(&[&"evaluate", &target, &fixture("text/legal.txt"), &"--windows", &"4"]);
    let against: Value = json(&[
        &"evaluate",
        &target,
        &fixture("text/legal.txt"),
        &"--windows",
        &"4",
        &"--against",
        &p.model,
    ]);
    // Rows are grouped otherwise when two models are compared.
    let (one, two) = (score["nll"].as_f64().unwrap(), against["other"]["nll"].as_f64().unwrap());
    assert!((one - two).abs() < 1e-6, "{one} {two}");
    assert!(against["kl"].as_f64().unwrap() > 0.0);
    let text = json(&[&"generate", &target, &"The court", &"--tokens", &"4"]);
    assert!(text["continuation"].is_string());
}

#[test]
fn a_recipe_runs_end_to_end_on_any_number_of_threads() {
    let p = Places::new();
    let recipe = p.at("recipe.toml");
    fs::write(&recipe, "preset = \"mc-smoe\"\nexport = \"native\"\n[keep]\nexperts = 4\n").unwrap();
    let legal = fixture("text/legal.txt");
    let once = |target: &Path, threads: &str| {
        json(&[
            &"run",
            &p.model,
            &p.text,
            &target,
            &"--recipe",
            &recipe,
            &"--tokens",
            &"1024",
            &"--evaluate",
            &legal,
            &"--threads",
            &threads,
            &"--shard-size",
            &"700k",
        ])
    };
    let (one, two) = (p.at("one"), p.at("two"));
    let done = once(&one, "1");
    let evaluated = p.at("run.json");
    fs::write(&evaluated, done.to_string()).unwrap();
    assert!(done["comparison"]["kl"].as_f64().unwrap() > 0.0);
    assert!(done["verification"]["checks"].as_array().unwrap().len() >= 7);
    assert!(done["report"]["compression"].is_object());
    once(&two, "3");
    assert_same(&one, &two);
    assert!(contents(&one).len() > 8, "shards of 700 kB");
    // The same by `compress`, from the statistics of the same text.
    let stats = p.at("stats.safetensors");
    let told = json(&[&"calibrate", &p.model, &p.text, &stats, &"--tokens", &"1024"]);
    assert_eq!((&told["tokens"], &told["layers"]), (&1024.into(), &4.into()));
    let compressed = p.at("compressed");
    json(&[
        &"compress",
        &p.model,
        &stats,
        &compressed,
        &"--recipe",
        &recipe,
        &"--shard-size",
        &"700k",
    ]);
    let card = compressed.join("README.md");
    json(&[&"report", &compressed, &"--card", &card, &"--evaluation", &evaluated]);
    let (mut ran, mut from_file) = (contents(&one), contents(&compressed));
    for (name, says) in [("mcsmoe.json", "legal.txt"), ("README.md", "legal.txt")] {
        // Both name the text; the statistics file is named by one of them.
        for files in [&mut ran, &mut from_file] {
            let bytes = files.remove(name).unwrap();
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(says), "{name}");
        }
    }
    assert!(ran == from_file, "the same tensors");
}

#[test]
fn a_run_leaves_a_card_and_a_page() {
    let p = Places::new();
    let (model, target, page) = (p.at("model"), p.at("target"), p.at("page.html"));
    fs::create_dir(&model).unwrap();
    for (name, bytes) in contents(&p.model) {
        fs::write(model.join(name), bytes).unwrap();
    }
    let original = "---\nlicense: mit\n---\n# Of the original\n";
    fs::write(model.join("README.md"), original).unwrap();
    json(&[&"run", &model, &p.stats, &target, &"--keep", &"4", &"--html", &page]);
    let card = fs::read_to_string(target.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: mit\nlibrary_name: transformers\n"), "{card}");
    assert!(card.contains("16 of 32 experts") && card.ends_with("# Of the original\n"), "{card}");
    json(&[&"verify", &target, &"--source", &model]);

    // The same page later, and with a perplexity; the card in the target is renewed in its place.
    let (again, score) = (p.at("again.html"), p.at("score.json"));
    json(&[&"report", &target, &"--html", &again]);
    assert_eq!(fs::read(&again).unwrap(), fs::read(&page).unwrap());
    let legal = fixture("text/legal.txt");
    let found = json(&[&"evaluate", &target, &legal, &"--windows", &"1"]);
    fs::write(&score, found.to_string()).unwrap();
    let file = target.join("README.md");
    let (html, card, with) = ("--html", "--card", "--evaluation");
    json(&[&"report", &target, &html, &again, &card, &file, &with, &score]);
    let renewed = fs::read_to_string(&file).unwrap();
    assert!(renewed.contains("Perplexity ") && renewed.ends_with("# Of the original\n"));
    assert!(fs::read_to_string(&again).unwrap().contains("perplexity</span>"));
    json(&[&"verify", &target, &"--source", &model]);
    let (code, _, err) = run(&[&"report", &target, &"--html", &again, &"--evaluation", &file]);
    assert!(code == 3 && err.contains("README.md"), "{err}");
}

#[test]
fn what_a_run_evaluated_is_in_later_reports_and_fast_merges_nothing() {
    let p = Places::new();
    let (target, page, text) = (p.at("target"), p.at("page.html"), p.at("held-out.txt"));
    let legal = fs::read_to_string(fixture("text/legal.txt")).unwrap();
    fs::write(&text, legal.chars().take(6000).collect::<String>()).unwrap();
    json(&[&"run", &p.model, &p.stats, &target, &"--keep", &"4", &"--evaluate", &text]);
    json(&[&"report", &target, &"--html", &page]);
    assert!(fs::read_to_string(&page).unwrap().contains("perplexity</span>"));
    json(&[&"verify", &target, &"--source", &p.model]);
    let card = fs::read_to_string(target.join("README.md")).unwrap();
    let (_, told, _) = run(&[&"report", &target]);
    assert!([&card, &told].iter().all(|text| text.contains("16 refitted, 16 dropped")), "{told}");
    assert!(card.contains("- expert-pruning\n") && !card.contains("expert-merging"), "{card}");
    assert!(told.lines().all(|line| line.chars().count() < 130), "{told}");
    // A file of a model is its folder.
    let found = json(&[&"inspect", &p.model.join("config.json")]);
    assert_eq!(found["family"], "mixtral");
}

#[test]
fn exit_codes_are_those_of_the_table() {
    let p = Places::new();
    let target = p.at("target");
    let code = |expected: i32, args: &[&dyn AsRef<std::ffi::OsStr>], says: &str| {
        let (found, out, err) = run(args);
        assert_eq!(found, expected, "{out}{err}");
        assert!(err.contains(says), "{err}");
        assert!(!target.exists() || expected == 6);
    };
    let (model, stats) = (&p.model, &p.stats);
    code(2, &[&"merge", model, stats, &target], "--keep");
    code(2, &[&"merge", model, stats, &target, &"--keep", &"many"], "a share");
    code(2, &[&"merge", model, stats, &target, &"--keep", &"4", &"--preset", &"x"], "fast");
    code(2, &[&"merge", model, stats, &target, &"--keep", &"4", &"--device", &"tpu"], "no device");
    code(2, &[&"frobnicate"], "frobnicate");
    code(3, &[&"inspect", &p.at("none")], "No such file");
    code(3, &[&"merge", model, &p.at("none.txt"), &target, &"--keep", &"4"], "none.txt");
    code(3, &[&"merge", &fixture("text"), stats, &target, &"--keep", &"4"], "config.json");
    code(4, &[&"merge", model, stats, &target, &"--keep", &"1"], "the router chooses 2");
    code(5, &[&"merge", model, stats, model, &"--keep", &"4"], "it is the source");
    code(7, &[&"merge", model, stats, &target, &"--keep", &"4", &"--max-memory", &"1M"], "memory");
    code(7, &[&"plan", model, &"--keep", &"4", &"--max-memory", &"1M"], "memory");
    assert_eq!(run(&[&"merge", model, stats, &target, &"--keep", &"4", &"-q"]).0, 0);
    fs::write(target.join("config.json"), "{}").unwrap();
    code(6, &[&"verify", &target, &"--source", model], "verification failed: 2 findings");

    let (found, out, _) = run(&[&"--json", &"inspect", &p.at("none")]);
    let error: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((found, &error["error"]["kind"]), (3, &"not-found".into()));
    assert_eq!(error["error"]["exit_code"], 3);
    let (found, out, _) = run(&[&"--json", &"verify", &target]);
    let checks: Value = serde_json::from_str(&out).unwrap();
    assert!(found == 6 && checks["checks"].is_array());
    let (_, help, _) = run(&[&"--help"]);
    assert!((0..8).all(|code| help.contains(&format!("\n  {code}  "))), "{help}");
}

#[test]
fn a_dry_run_writes_nothing_and_tells_what_would_be_written() {
    let p = Places::new();
    let target = p.at("target");
    let common: [&dyn AsRef<std::ffi::OsStr>; 5] = [&p.model, &p.stats, &target, &"--keep", &"4"];
    let dry = json(&[&[&"merge" as _], &common[..], &[&"--dry-run" as _]].concat());
    assert_eq!(fs::read_dir(p.dir.path()).unwrap().count(), 0);
    let done = json(&[&[&"merge" as _], &common[..]].concat());
    assert_eq!(dry["tensor_bytes"], done["report"]["written"]["tensor_bytes"]);
    assert_eq!(dry["runtimes"].as_array().unwrap().len(), 3);
    // The target is in the way now, and a dry run tells that too.
    assert_eq!(run(&[&[&"merge" as _], &common[..], &[&"--dry-run" as _]].concat()).0, 5);
    let (code, text, _) = run(&[&"plan", &p.model, &"--keep", &"4"]);
    assert!(code == 0 && text.contains("llama.cpp     accepts"), "{text}");
}

#[test]
fn a_killed_run_is_resumed_to_the_same_bytes() {
    let p = Places::new();
    let args = |target: &Path, more: &[&'static str]| {
        let mut command = tool(&[&"run", &p.model, &p.text, &target, &"--keep", &"4", &"--quiet"]);
        command.args(["--preset", "balanced", "--tokens", "2048"]).args(more);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let (whole, target) = (p.at("whole"), p.at("target"));
    assert!(args(&whole, &[]).status().unwrap().success());
    let mut child = args(&target, &["--resume"]).spawn().unwrap();
    let journal = p.at("target.partial").join("mcsmoe.journal");
    let layer_done = || fs::read_to_string(&journal).is_ok_and(|text| text.contains("\"layer\":["));
    while !layer_done() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if !target.exists() {
        assert_eq!(args(&target, &[]).status().unwrap().code(), Some(5), "without --resume");
        let other = ["--resume", "--seed", "9"];
        assert_eq!(args(&target, &other).status().unwrap().code(), Some(5), "another recipe");
    }
    // Of a target that is whole only the card may be missing.
    assert!(args(&target, &["--resume"]).status().unwrap().success());
    assert_same(&target, &whole);
}

#[test]
fn parts_made_by_several_processes_join_to_the_bytes_of_one() {
    let p = Places::new();
    for (preset, export) in [("fast", "stock"), ("m-smoe", "native"), ("hc-smoe", "expanded")] {
        let whole = p.at(&format!("{preset}-whole"));
        let method: [&dyn AsRef<std::ffi::OsStr>; 9] = [
            &"--preset",
            &preset,
            &"--export",
            &export,
            &"--keep",
            &"4",
            &"--shard-size",
            &"900k",
            &"--quiet",
        ];
        let with = |head: &[&dyn AsRef<std::ffi::OsStr>]| tool(&[head, &method[..]].concat());
        let status = |mut c: Command| c.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let merge = with(&[&"run", &p.model, &p.stats, &whole]);
        assert!(status(merge).unwrap().success());
        // At the same time, each with its own folder; one range, two shares of three.
        let parts: Vec<PathBuf> = (0..3).map(|i| p.at(&format!("{preset}-part-{i}"))).collect();
        let children: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(i, part)| {
                let mut child = with(&[&"run", &p.model, &p.stats, part]);
                child.arg("--part").arg(format!("{i}/3")).stdout(Stdio::null()).spawn().unwrap()
            })
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let target = p.at(&format!("{preset}-joined"));
        let assemble = |parts: &[&PathBuf]| {
            let mut head: Vec<&dyn AsRef<std::ffi::OsStr>> =
                vec![&"assemble", &p.model, &p.stats, &target];
            parts.iter().for_each(|part| head.push(part));
            status(with(&head)).unwrap().code()
        };
        assert_eq!(assemble(&[&parts[0], &parts[2]]), Some(5), "a part is missing");
        assert_eq!(assemble(&[&parts[0], &parts[1], &parts[2], &parts[1]]), Some(5), "twice");
        assert_eq!(assemble(&parts.iter().collect::<Vec<_>>()), Some(0));
        assert_eq!(contents(&target), contents(&whole), "{preset}");
        let again = {
            let mut child = with(&[&"run", &p.model, &p.stats, &parts[1], &"--resume"]);
            child.arg("--part").arg("1/3");
            status(child).unwrap().code()
        };
        assert_eq!(again, Some(0), "a job that is queued again does no harm");
    }
    // A damaged part is refused, and so is one of another recipe.
    let part = p.at("fast-part-0");
    let shard = contents(&part).into_keys().find(|n| n.ends_with("safetensors")).unwrap();
    let mut bytes = fs::read(part.join(&shard)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(part.join(shard), bytes).unwrap();
    let join = |keep: &str, name: &str| {
        let target = p.at(name);
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"assemble", &p.model, &p.stats, &target];
        let parts: Vec<PathBuf> = (0..3).map(|i| p.at(&format!("fast-part-{i}"))).collect();
        parts.iter().for_each(|part| args.push(part));
        args.extend([&"--keep" as &dyn AsRef<std::ffi::OsStr>, &keep, &"--shard-size", &"900k"]);
        run(&args)
    };
    let (code, _, err) = join("4", "damaged");
    assert!(code == 3 && err.contains("not those that its manifest tells"), "{err}");
    let (code, _, err) = join("5", "other");
    assert!(code == 5 && err.contains("another recipe or export"), "{err}");
    assert!(!p.at("damaged").exists() && !p.at("other").exists());
}

#[test]
fn statistics_are_converted_and_progress_is_plain_without_a_terminal() {
    let p = Places::new();
    let (small, text, back) = (p.at("s.safetensors"), p.at("s.json"), p.at("b.safetensors"));
    json(&[&"convert-stats", &p.stats, &small, &"--no-samples"]);
    json(&[&"convert-stats", &small, &text]);
    json(&[&"convert-stats", &text, &back]);
    assert_eq!(fs::read(&small).unwrap(), fs::read(&back).unwrap());
    assert_eq!(run(&[&"convert-stats", &small, &text]).0, 2, "it exists");

    let target = p.at("target");
    let (code, _, err) =
        run(&[&"merge", &p.model, &back, &target, &"--preset", &"m-smoe", &"--keep", &"4"]);
    assert_eq!(code, 0, "{err}");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!(lines.len(), 8, "a line for every layer and phase: {err}");
    assert!(
        lines[7].starts_with("merge layers.3 (4 of 4), ") && lines[7].contains(" left, peak"),
        "{err}"
    );
    assert!(!err.contains('\u{1b}'), "no escape codes");

    let pages = p.at("man");
    assert_eq!(run(&[&"man", &pages]).0, 0);
    assert!(contents(&pages).contains_key("mcsmoe-verify.1"));
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = run(&[&"completions", &shell]);
        assert!(code == 0 && script.contains("convert-stats"));
    }
}

#[test]
fn a_model_writes_text_that_a_run_takes() {
    let p = Places::new();
    let (texts, target) = (p.at("texts"), p.at("merged"));
    fs::create_dir(&texts).unwrap();
    fs::copy(fixture("text/calib/python.txt"), texts.join("python.txt")).unwrap();
    let (ids, lines) = (texts.join("own.safetensors"), p.at("own.jsonl"));
    let write: [&dyn AsRef<std::ffi::OsStr>; 8] =
        [&"write-text", &p.model, &ids, &"--tokens", &"1000", &"--jsonl", &lines, &"--quiet"];
    let done = json(&write);
    assert_eq!((&done["sequences"], &done["tokens"]), (&31.into(), &992.into()));
    let text = fs::read_to_string(&lines).unwrap();
    assert_eq!(text.lines().count(), 31);
    assert!(
        text.lines().all(|line| serde_json::from_str::<Value>(line).unwrap()["text"].is_string())
    );
    // What exists is not overwritten.
    let before = fs::read(&ids).unwrap();
    let (code, _, err) = run(&write);
    assert!(code != 0 && err.contains("own.safetensors"), "{code} {err}");
    assert_eq!(fs::read(&ids).unwrap(), before);
    json(&[&"run", &p.model, &texts, &target, &"--keep", &"50%"]);
}

#[test]
fn own_text_beside_a_text_is_in_the_manifest() {
    let p = Places::new();
    let (one, two) = (p.at("one"), p.at("two"));
    let shared: [&dyn AsRef<std::ffi::OsStr>; 4] = [&"--keep", &"50%", &"--tokens", &"2048"];
    let text = fixture("text/calib/python.txt");
    let run = |target: &PathBuf, own: &str| {
        let head: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"run", &p.model, &text, target, &"--own-text", &own.to_owned()];
        json(&[&head[..], &shared[..]].concat())
    };
    let done = run(&one, "1024");
    let record = &done["report"]["calibration"]["text"];
    assert_eq!((&record["tokens"], &record["own_text"]["tokens"]), (&3072.into(), &1024.into()));
    let last = record["sources"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["name"], &last["windows"]), (&"own text".into(), &32.into()));
    let without = run(&two, "0");
    assert!(without["report"]["calibration"]["text"]["own_text"].is_null());
    let weights = |target: &Path| contents(target)["model.safetensors"].clone();
    assert!(weights(&one) != weights(&two));
}
