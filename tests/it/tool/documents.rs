//! Every command in README.md, CONTRIBUTING.md and docs/ either runs here, in the order of its page
//! and on the bundled checkpoint, or is named in `not_run.rs` with the reason why not.

mod blocks;
mod not_run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blocks::{Document, documents, root};
use not_run::NOT_RUN;

/// A folder with what the documents speak of.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = root().join("tests/fixtures");
    let copy = |from: PathBuf, to: PathBuf| {
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
    };
    copy(fixtures.join("mixtral-8e"), dir.path().join("model"));
    copy(fixtures.join("text/calib"), dir.path().join("texts"));
    fs::copy(fixtures.join("text/legal.txt"), dir.path().join("held-out.txt")).unwrap();
    dir
}

/// A shell in `dir` that finds the tool.
fn shell(dir: &Path, script: &str, env: &[(&str, String)]) -> Child {
    let tool = Path::new(env!("CARGO_BIN_EXE_mcsmoe")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .env("PATH", format!("{}:{path}", tool.display()))
        .envs(env.iter().map(|(name, value)| (name, value)))
        .current_dir(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn succeeds(child: Child, script: &str) {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{script}\n{out}\n{err}");
}

fn run(document: &str) -> (tempfile::TempDir, String) {
    let dir = place();
    let mut all = String::new();
    for script in Document::read(document).scripts() {
        succeeds(shell(dir.path(), script, &[]), script);
        all.push_str(script);
    }
    (dir, all)
}

/// Documents whose scripts the tests below run.
const RUN: [&str; 5] =
    ["README.md", "docs/CLI.md", "docs/GUIDE.md", "docs/SCALE.md", "docs/TEXT.md"];

#[test]
fn every_command_is_run_or_named_with_a_reason() {
    let mut met = vec![false; NOT_RUN.len()];
    for name in documents() {
        let document = Document::read(&name);
        let scripts = document.scripts().count();
        assert_eq!(scripts > 0, RUN.contains(&&*name), "{name}: {scripts} scripts, run by no test");
        for command in document.other_commands() {
            let entry = |(of, start, _): &(&str, &str, &str)| {
                (*of == name || *of == "*") && command.starts_with(start)
            };
            let at = NOT_RUN.iter().position(entry);
            let why = "neither run by this test nor in tests/it/tool/documents/not_run.rs";
            met[at.unwrap_or_else(|| panic!("{name}: `{command}` is {why}"))] = true;
            exists(&name, &command);
        }
    }
    let entries = NOT_RUN.iter().zip(met);
    let stale: Vec<_> =
        entries.filter(|(_, met)| !met).map(|((of, start, _), _)| (of, start)).collect();
    assert!(stale.is_empty(), "in no document: {stale:?}");
}

/// What a command that is not run names is there: programs, options, examples, tests, gates.
fn exists(document: &str, command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let there = |path: String| {
        assert!(root().join(&path).exists(), "{document}: `{command}`: no {path}");
        fs::read_to_string(root().join(path)).unwrap()
    };
    let after = |option: &str| {
        let at = words.iter().position(|word| *word == option)?;
        words.get(at + 1).copied()
    };
    for (option, folder) in [("--example", "examples"), ("--test", "tests"), ("--bench", "benches")]
    {
        let Some(name) = after(option) else { continue };
        let single = format!("{folder}/{name}.rs");
        let split = format!("{folder}/{name}/main.rs");
        let source = there(if root().join(&split).exists() { split } else { single });
        if let Some(filter) = after(name).filter(|word| name == "it" && !word.starts_with('-')) {
            let tests = names_of_tests(&root().join("tests/it"), "");
            let found = tests.iter().any(|test| test.contains(filter));
            assert!(found, "{document}: `{command}`: no test {filter}");
        }
        let own = command.split_once(" -- ").map_or("", |(_, own)| own);
        for word in own.split_whitespace().filter(|_| option == "--example") {
            let word = word.trim_matches(['[', ']']);
            assert!(source.contains(word), "{document}: `{command}`: the example has no {word}");
        }
    }
    if let Some(script) = words.iter().find(|word| word.starts_with("tools/")) {
        let source = there((*script).to_owned());
        for option in words.iter().filter(|word| word.starts_with("--")) {
            assert!(source.contains(option), "{document}: `{command}`: no {option}");
        }
    }
    if words[0] == ".ci/run" {
        let source = there(words[0].to_owned());
        for gate in &words[1..] {
            assert!(source.contains(&format!("gate_{gate}()")), "{document}: no gate {gate}");
        }
    }
}

/// Every function of the test modules in a folder, by its path: `laws::merge::function`.
fn names_of_tests(folder: &Path, module: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let module = format!("{module}{}::", path.file_stem().unwrap().to_str().unwrap());
        if path.is_dir() {
            found.extend(names_of_tests(&path, &module));
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        let names = source.lines().filter_map(|line| line.strip_prefix("fn ")?.split('(').next());
        found.extend(names.map(|name| format!("{module}{name}")));
    }
    found
}

/// Model, preset, export, share of experts kept, nats and those of the original, seconds, peak of
/// memory in MB, calibration tokens; the last three may be unknown.
#[test]
fn figures_of_quality_are_rows_and_the_picture_shows_them() {
    let read = |name: &str| fs::read_to_string(root().join("docs").join(name)).unwrap();
    let (rows, picture) = (read("quality.csv"), read("quality.svg"));
    let heading = "model,preset,export,kept,nats,reference_nats,seconds,peak_mb,tokens";
    let mut lines = rows.lines();
    assert_eq!(lines.next(), Some(heading));
    for line in lines.filter(|line| *line != heading) {
        let cells: Vec<&str> = line.split(',').collect();
        let [model, preset, export, kept, nats, reference, known @ ..] = &cells[..] else {
            panic!("{line}");
        };
        let number = |cell: &str| cell.parse::<f64>().unwrap_or_else(|_| panic!("{line}: {cell}"));
        assert!(
            known.len() == 3 && known.iter().all(|c| c.is_empty() || number(c) > 0.0),
            "{line}"
        );
        assert!(["stock", "native"].contains(export) && (0.0..=1.0).contains(&number(kept)));
        assert!(number(nats) > 0.0 && number(reference) > 0.0, "{line}");
        let shown = |text: &str| picture.contains(&format!(">{text}</text>"));
        assert!(*export != "stock" || shown(model) && shown(preset), "{line}: not in the picture");
    }
}

#[test]
fn a_newcomer_needs_three_commands() {
    let dir = place();
    let readme = Document::read("README.md");
    let script = readme.scripts().next().unwrap();
    let joined = script.replace("\\\n", "");
    let commands: Vec<&str> = joined.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(commands.len(), 3, "{script}");
    // `.ci/run features` installs the tool; here the one that was built with this test is found.
    let (install, rest) = script.split_once('\n').unwrap();
    assert_eq!(install, "cargo install --path . --features cli");
    let clone = dir.path().join("tests");
    fs::create_dir(&clone).unwrap();
    std::os::unix::fs::symlink(root().join("tests/fixtures"), clone.join("fixtures")).unwrap();
    succeeds(shell(dir.path(), rest, &[]), rest);
    let page = fs::read_to_string(dir.path().join("smaller.html")).unwrap();
    assert!(page.contains("smaller") && page.ends_with("</html>\n"));
}

#[test]
fn the_reference_runs_and_names_every_command() {
    let (_dir, scripts) = run("docs/CLI.md");
    let output = Command::new(env!("CARGO_BIN_EXE_mcsmoe")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let commands = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = commands.lines().filter_map(|line| line.split_whitespace().next());
    let elsewhere = ["help", "assemble"];
    for name in names.filter(|name| !elsewhere.contains(name)) {
        assert!(scripts.contains(&format!("mcsmoe {name} ")), "docs/CLI.md lacks {name}");
    }
}

#[test]
fn the_guide_runs() {
    let (dir, _) = run("docs/GUIDE.md");
    assert!(dir.path().join("smaller/model.safetensors").exists());
}

#[test]
fn the_page_on_text_runs() {
    let (dir, _) = run("docs/TEXT.md");
    let manifest = fs::read_to_string(dir.path().join("chatty/mcsmoe.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let text = &manifest["calibration"]["text"];
    assert_eq!(text["template"]["file"], "chat.jinja");
    assert_eq!(text["files"][0]["documents"], 400);
}

#[test]
fn the_scripts_for_clusters_run_as_processes() {
    let dir = place();
    for (language, script) in Document::read("docs/SCALE.md").blocks {
        match &*language {
            "sh" => succeeds(shell(dir.path(), &script, &[]), &script),
            "slurm" => {
                let task = |i: usize| {
                    let env = [("SLURM_ARRAY_TASK_ID", i), ("SLURM_ARRAY_TASK_COUNT", 3)];
                    shell(dir.path(), &script, &env.map(|(name, i)| (name, i.to_string())))
                };
                let tasks: Vec<Child> = (0..3).map(task).collect();
                tasks.into_iter().for_each(|child| succeeds(child, &script));
            }
            "yaml" => {
                let job: serde_yaml_ng::Value = serde_yaml_ng::from_str(&script).unwrap();
                let container = &job["spec"]["template"]["spec"]["containers"][0];
                assert_eq!(container["command"][1], "-c");
                let command = container["args"][0].as_str().unwrap();
                let pod = |i: usize| {
                    shell(dir.path(), command, &[("JOB_COMPLETION_INDEX", i.to_string())])
                };
                let pods: Vec<Child> = (0..3).map(pod).collect();
                pods.into_iter().for_each(|child| succeeds(child, command));
                let join = "mcsmoe assemble model stats.safetensors from-pods pods/* --keep 4";
                succeeds(shell(dir.path(), join, &[]), join);
            }
            _ => {}
        }
    }
    let file = |folder: &str| fs::read(dir.path().join(folder).join("mcsmoe.json")).unwrap();
    assert_eq!(file("joined"), file("from-slurm"));
    assert_eq!(file("joined"), file("from-pods"));
}
