//! The dependency rule between layers of modules: foundation, core, stages, pipeline. Modules of
//! the stages layer never import each other; only the pipeline imports them all.

use std::fs;
use std::path::{Path, PathBuf};

const FOUNDATION: &[&str] = &["error", "par", "linalg"];
/// The safetensors format and hashes as text: for whatever reads or writes files.
const FILES: &[&str] = &["digest", "tensor_file"];
/// Implements `linalg::Compute`; only a context chooses it.
const GPU: &str = "gpu";
const CORE: &[&str] = &["error", "par", "linalg", "model"];
/// What is particular about each model family, read by checkpoint, forward and plan.
const FAMILIES: &str = "families";
const STAGES: &[&str] = &[
    "checkpoint",
    "forward",
    "calibrate",
    "similarity",
    "group",
    "align",
    "merge",
    "recover",
    "decompose",
];

/// What a module may import from the crate; `None` is the pipeline layer, which may import
/// everything.
fn allowed(module: &str) -> Option<Vec<&'static str>> {
    let set = match module {
        "error" | "digest" => &[][..],
        "par" | "tensor_file" => &["error"],
        "linalg" => FOUNDATION,
        "model" => CORE,
        GPU => FOUNDATION,
        FAMILIES => CORE,
        "stage" => return Some([CORE, &[GPU]].concat()),
        module if STAGES.contains(&module) => {
            return Some([CORE, FILES, &["stage", FAMILIES]].concat());
        }
        // Draws what the pipeline reports; it runs nothing.
        "report" => return Some([CORE, FILES, &["checkpoint", "pipeline"]].concat()),
        "pipeline" | "lib" | "prelude" => return None,
        other => panic!(
            "src/{other} belongs to no layer: name it in tests/it/repository/architecture.rs"
        ),
    };
    Some(set.to_vec())
}

/// Files below `dir` with one of the extensions.
fn texts(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            texts(&path, extensions, found);
        } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
            found.push(path);
        }
    }
}

/// The first path segment behind every `crate::` of a file, also inside `use crate::{a, b}`.
fn imports(text: &str) -> Vec<String> {
    let word = |s: &str| {
        s.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_owned()
    };
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let line = text[..at].rfind('\n').map_or(0, |n| n + 1);
        if text[line..at].trim_start().starts_with("//") {
            continue;
        }
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(list) => {
                let mut depth = 1;
                let mut item = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 1 => found.push(word(&std::mem::take(&mut item))),
                        _ => item.push(c),
                    }
                    if depth == 0 {
                        break;
                    }
                }
                found.push(word(&item));
            }
        }
    }
    // Names with a capital are re-exports of the crate root, which are the error types only.
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn modules_of_the_stages_layer_never_import_each_other() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    texts(&src, &["rs"], &mut files);
    assert!(files.len() > 20, "the scan found only {} files", files.len());
    let mut forbidden = Vec::new();
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = module.trim_end_matches(".rs");
        if module == "bin" {
            continue;
        }
        let Some(allowed) = allowed(module) else { continue };
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            let error_type = ["DeviceFault", "Error", "ErrorKind", "Locate", "Place", "Result"]
                .contains(&&*import);
            if import != module && !error_type && !allowed.contains(&&*import) {
                forbidden.push(format!("{} imports crate::{import}", relative.display()));
            }
        }
    }
    assert!(forbidden.is_empty(), "forbidden imports:\n{}", forbidden.join("\n"));
}

#[test]
fn the_scan_sees_nested_lists_and_skips_comments() {
    let text = "use crate::{error::Result, model::{A, B}};\n\
                /// [`crate::group`]\nlet x = crate::merge::f();";
    assert_eq!(imports(text), ["error", "model", "merge"]);
}

#[test]
fn lines_stay_within_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "tests", "benches", "examples", "docs", "tools", "fuzz/src"] {
        if root.join(dir).is_dir() {
            texts(&root.join(dir), &["rs", "md", "py"], &mut files);
        }
    }
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "justfile"] {
        files.extend(Some(root.join(name)).filter(|path| path.is_file()));
    }
    for file in files {
        for (n, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            // A row of a Markdown table cannot be wrapped.
            let table = line.starts_with('|') && file.extension().is_some_and(|e| e == "md");
            assert!(table || line.chars().count() <= 100, "{}:{}", file.display(), n + 1);
        }
    }
}

/// What a room of the pipeline may import from the others.
const PIPELINE: &[(&str, &[&str])] = &[
    ("options", &[]),
    ("report", &["provenance"]),
    ("provenance", &["report"]),
    ("progress", &["report"]),
    ("builder", &["options", "provenance"]),
    ("activations", &["options", "progress", "provenance"]),
    ("layer", &["options", "report", "progress", "builder", "activations"]),
    ("recipe", &["options", "builder"]),
];

#[test]
fn rooms_of_the_pipeline_import_downwards_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/pipeline");
    let mut forbidden = Vec::new();
    for (room, allowed) in PIPELINE {
        let (mut files, folder) = (Vec::new(), root.join(room));
        match folder.is_dir() {
            true => texts(&folder, &["rs"], &mut files),
            false => files.push(root.join(format!("{room}.rs"))),
        }
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for part in line.split("crate::pipeline::").skip(1) {
                    let name = part.split(|c: char| !c.is_alphanumeric() && c != '_').next();
                    let name = name.unwrap_or("");
                    let module =
                        root.join(name).is_dir() || root.join(name).with_extension("rs").is_file();
                    if module && name != *room && !allowed.contains(&name) {
                        forbidden.push(format!("{} imports {name}", file.display()));
                    }
                }
            }
        }
    }
    assert!(forbidden.is_empty(), "forbidden imports:\n{}", forbidden.join("\n"));
}
