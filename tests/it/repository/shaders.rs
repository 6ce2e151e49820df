//! Every shader is valid WGSL, keeps to the smallest limits that WebGPU guarantees, and says what
//! it is. Needs no GPU.

use std::fs;
use std::path::{Path, PathBuf};

use naga::proc::Layouter;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, Module, front::wgsl};

/// Least workgroup storage and threads that every WebGPU adapter has.
const STORAGE: u32 = 16_384;
const THREADS: u32 = 256;

fn shaders() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        files.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect();
    found.sort();
    assert!(found.len() >= 6, "{} shaders", found.len());
    found
}

fn parse(path: &Path, text: &str) -> Module {
    let module = wgsl::parse_str(text);
    module.unwrap_or_else(|e| panic!("{}: {}", path.display(), e.emit_to_string(text)))
}

#[test]
fn every_shader_is_valid_without_any_extension() {
    for (path, text) in shaders() {
        let module = parse(&path, &text);
        let mut validator = Validator::new(ValidationFlags::all(), Capabilities::empty());
        let found = validator.validate(&module);
        found.unwrap_or_else(|e| panic!("{}: {}", path.display(), e.emit_to_string(&text)));
    }
}

#[test]
fn an_invalid_shader_would_be_seen() {
    assert!(wgsl::parse_str("fn main() { let x: f32 = 1u; }").is_err());
}

#[test]
fn one_kernel_a_file_within_the_least_limits() {
    for (path, text) in shaders() {
        let module = parse(&path, &text);
        let [kernel] = &module.entry_points[..] else { panic!("{}", path.display()) };
        assert_eq!(kernel.name, "main");
        let threads: u32 = kernel.workgroup_size.iter().product();
        assert!(threads <= THREADS, "{}: {threads} threads", path.display());
        let mut layouter = Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let shared =
            module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
        let bytes: u32 = shared.map(|(_, v)| layouter[v.ty].size).sum();
        assert!(bytes <= STORAGE, "{}: {bytes} bytes of workgroup memory", path.display());
    }
}

#[test]
fn the_header_names_shapes_bindings_workgroup_and_the_cpu_twin() {
    for (path, text) in shaders() {
        let header: String = text.lines().take_while(|line| line.starts_with("//")).collect();
        for word in ["Shapes:", "Bindings:", "Workgroup:", "CPU twin:"] {
            assert!(header.contains(word), "{}: no {word}", path.display());
        }
        let module = parse(&path, &text);
        for (_, variable) in module.global_variables.iter() {
            let Some(at) = &variable.binding else { continue };
            assert!(at.group == 0 && header.contains(&format!("{} ", at.binding)));
        }
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{}", path.display());
    }
}
