//! Every command of the tool in docs/ runs, in the order of the page, on the bundled checkpoint.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The fenced blocks of a document: language and text.
fn blocks(document: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("docs").join(document)).unwrap();
    let mut blocks: Vec<(String, String)> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        if let Some(language) = line.strip_prefix("```") {
            open = !open;
            if open {
                blocks.push((language.to_owned(), String::new()));
            }
        } else if open {
            let (_, block) = blocks.last_mut().unwrap();
            block.push_str(line);
            block.push('\n');
        }
    }
    assert!(!open, "{document}: a block is not closed");
    blocks
}

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
    for (_, script) in blocks(document).into_iter().filter(|(language, _)| language == "sh") {
        succeeds(shell(dir.path(), &script, &[]), &script);
        all.push_str(&script);
    }
    (dir, all)
}

#[test]
fn the_reference_runs_and_names_every_command() {
    let (_dir, scripts) = run("CLI.md");
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
    let (dir, _) = run("GUIDE.md");
    assert!(dir.path().join("smaller/model.safetensors").exists());
}

#[test]
fn the_scripts_for_clusters_run_as_processes() {
    let dir = place();
    for (language, script) in blocks("SCALE.md") {
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
