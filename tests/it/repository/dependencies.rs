//! What the crate is built from: no dependency asks for a younger compiler than it does, and each
//! may be distributed under its licence.

use std::process::Command;

use serde_json::Value;

/// Licences whose terms a program under the MIT licence meets by naming them.
const LICENCES: [&str; 9] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The packages of this platform with these features; the others in the lock file are never built.
fn packages(features: &str) -> Vec<Value> {
    let rustc = output(Command::new("rustc").arg("-vV"));
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let metadata = output(
        Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host])
            .args(["--features", features])
            .current_dir(env!("CARGO_MANIFEST_DIR")),
    );
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let used: Vec<&str> = nodes.iter().map(|node| node["id"].as_str().unwrap()).collect();
    let all = metadata["packages"].as_array().unwrap().iter();
    let found: Vec<Value> =
        all.filter(|p| used.contains(&p["id"].as_str().unwrap())).cloned().collect();
    assert!(found.len() > 5, "the scan found only {} packages", found.len());
    found
}

fn version(text: &str) -> Vec<u32> {
    let mut parts: Vec<u32> = text.split('.').map(|n| n.parse().unwrap()).collect();
    parts.resize(3, 0);
    parts
}

#[test]
fn dependencies_build_on_the_declared_rust_version() {
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    let mut younger = Vec::new();
    for package in packages("cli") {
        let Some(theirs) = package["rust_version"].as_str() else { continue };
        if version(theirs) > ours {
            younger.push(format!("{} needs {theirs}", package["name"]));
        }
    }
    assert!(younger.is_empty(), "younger than rust-version: {}", younger.join(", "));
}

/// Whether an SPDX expression can be met by the licences above: each part of an `AND` by one of its
/// alternatives. Old packages write `/` for `OR`.
fn allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    expression.split(" AND ").all(|part| {
        let part = part.trim().trim_start_matches('(').trim_end_matches(')');
        part.split(" OR ").any(|licence| LICENCES.contains(&licence.trim()))
    })
}

#[test]
fn dependencies_come_from_the_registry_under_licences_that_ours_allows() {
    assert!(allowed("(MIT OR GPL-3.0) AND Unicode-3.0") && allowed("Apache-2.0/MIT"));
    assert!(!allowed("MIT AND GPL-3.0") && !allowed("LGPL-2.1"));
    let mut others = Vec::new();
    for package in packages("cli,gpu,lapack") {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        let registry = "registry+https://github.com/rust-lang/crates.io-index";
        let elsewhere = text("name") != "mcsmoe" && text("source") != registry;
        if elsewhere || !allowed(&text("license")) {
            others.push(format!("{}: {}, {}", text("name"), text("license"), text("source")));
        }
    }
    assert!(others.is_empty(), "{}", others.join("\n"));
}
