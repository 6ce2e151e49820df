//! What documents hold: fenced blocks, inline code, and the commands in them.

use std::fs;
use std::path::Path;

/// First words of what is a command where a document does not say so by `sh`.
const PROGRAMS: &[&str] = &[
    ".ci/run",
    "/usr/bin/time",
    "cargo",
    "hf",
    "just",
    "llama-server",
    "mcsmoe",
    "pip",
    "python",
    "python3",
    "vllm",
];

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every document with commands, by its path from the root.
pub(crate) fn documents() -> Vec<String> {
    let entries = fs::read_dir(root().join("docs")).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> =
        names.filter(|n| n.ends_with(".md")).map(|n| format!("docs/{n}")).collect();
    found.extend(["README.md".to_owned(), "CONTRIBUTING.md".to_owned()]);
    found.sort();
    found
}

/// A document in parts: its fenced blocks, with their language, and the text between them.
pub(crate) struct Document {
    pub(crate) blocks: Vec<(String, String)>,
    pub(crate) prose: String,
}

impl Document {
    pub(crate) fn read(name: &str) -> Self {
        let text = fs::read_to_string(root().join(name)).unwrap();
        let mut found = Self { blocks: Vec::new(), prose: String::new() };
        let mut open = false;
        for line in text.lines() {
            if let Some(language) = line.strip_prefix("```") {
                open = !open;
                if open {
                    found.blocks.push((language.to_owned(), String::new()));
                }
                continue;
            }
            let to = match open {
                true => &mut found.blocks.last_mut().unwrap().1,
                false => &mut found.prose,
            };
            to.push_str(line);
            to.push('\n');
        }
        assert!(!open, "{name}: a block is not closed");
        found
    }

    /// Scripts that the tests run: blocks of a shell in which the tool is called.
    pub(crate) fn scripts(&self) -> impl Iterator<Item = &str> {
        let shell = self.blocks.iter().filter(|(language, _)| language == "sh");
        shell.map(|(_, script)| &**script).filter(|script| calls_the_tool(script))
    }

    /// Commands that no test runs as they stand.
    pub(crate) fn other_commands(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (language, text) in &self.blocks {
            match &**language {
                "sh" if !calls_the_tool(text) => found.extend(commands(text)),
                "text" => found.extend(commands(text).into_iter().filter(|c| is_command(c))),
                "python" => found.extend(text.lines().next().map(str::to_owned)),
                _ => {}
            }
        }
        // Inline code is between odd and even back-quotes; it may go over the end of a line.
        let code = self.prose.split('`').skip(1).step_by(2);
        let code = code.map(|c| c.split_whitespace().collect::<Vec<_>>().join(" "));
        // `mcsmoe verify` is a name, not a command line.
        let named = |c: &str| c.starts_with("mcsmoe ") && c.split(' ').count() == 2;
        found.extend(code.filter(|c| c.contains(' ') && is_command(c) && !named(c)));
        found
    }
}

fn calls_the_tool(script: &str) -> bool {
    script.lines().any(|line| line.contains("mcsmoe ") && !line.starts_with("cargo"))
}

fn is_command(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let program = words.find(|word| !word.split_once('=').is_some_and(|(name, _)| is_name(name)));
    program.is_some_and(|word| PROGRAMS.contains(&word) || word.starts_with("tools/"))
}

fn is_name(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_uppercase() || c == '_')
}

/// The commands of a script, continuation lines joined, without comments and here-documents.
fn commands(script: &str) -> Vec<String> {
    let mut found = Vec::new();
    let (mut line, mut ends): (String, Option<String>) = Default::default();
    for next in script.lines() {
        if ends.is_some() {
            ends = ends.filter(|end| end != next);
            continue;
        }
        let code = next.split(" #").next().unwrap_or_default().trim();
        match code.strip_suffix('\\') {
            Some(part) => line.push_str(part),
            None => {
                line.push_str(code);
                ends = code.split_once("<<'").map(|(_, end)| end.trim_end_matches('\'').into());
                found.push(std::mem::take(&mut line));
            }
        }
    }
    found.retain(|command| !command.is_empty() && !command.starts_with('#'));
    found
}

#[test]
fn commands_are_found() {
    let script = "a \\\n    b  # why\ncat > f <<'END'\nno = 1\nEND\n\n# a comment\nc\n";
    assert_eq!(commands(script), ["a b", "cat > f <<'END'", "c"]);
    assert!(is_command("X_Y=1 cargo test") && is_command("tools/a.sh b") && !is_command("3.5 s"));
}
