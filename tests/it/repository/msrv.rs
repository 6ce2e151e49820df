//! No dependency asks for a younger compiler than this crate does.

use std::process::Command;

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn version(text: &str) -> Vec<u32> {
    let mut parts: Vec<u32> = text.split('.').map(|n| n.parse().unwrap()).collect();
    parts.resize(3, 0);
    parts
}

#[test]
fn dependencies_build_on_the_declared_rust_version() {
    let rustc = output(Command::new("rustc").arg("-vV"));
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let metadata = output(
        Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host])
            .args(["--features", "cli"])
            .current_dir(env!("CARGO_MANIFEST_DIR")),
    );
    let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    // The packages of this platform; the others in the lock file are never built here.
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let used: Vec<&str> = nodes.iter().map(|node| node["id"].as_str().unwrap()).collect();
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    let mut younger = Vec::new();
    for package in packages.iter().filter(|p| used.contains(&p["id"].as_str().unwrap())) {
        let Some(theirs) = package["rust_version"].as_str() else { continue };
        if version(theirs) > ours {
            younger.push(format!("{} needs {theirs}", package["name"]));
        }
    }
    assert!(packages.len() > 5, "the scan found only {} packages", packages.len());
    assert!(younger.is_empty(), "younger than rust-version: {}", younger.join(", "));
}
