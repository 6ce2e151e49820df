//! Commands in documents that no test runs as they stand: which, and why not. A command that is
//! neither run nor here fails the test, and so does an entry that no document has any more.

/// Document (`*`: any), beginning of the command, why it is not run.
pub(crate) const NOT_RUN: &[(&str, &str, &str)] = &[
    ("CONTRIBUTING.md", ".ci/run", GATE),
    ("CONTRIBUTING.md", "pip install torch", TORCH),
    ("README.md", "cargo run --release --features cli", "run below by the installed tool"),
    ("README.md", "mcsmoe run MODEL TEXTS TARGET", "the command above it, with other names"),
    ("docs/BENCHMARKS.md", "/usr/bin/time -v", BENCH),
    ("docs/BENCHMARKS.md", "cargo build --release --features cli", BENCH),
    ("docs/BENCHMARKS.md", "cat > /tmp/", BENCH),
    ("docs/BENCHMARKS.md", "python tools/check_exports.py", TORCH),
    ("docs/BENCHMARKS.md", "python tools/compare_logits.py", TORCH),
    ("docs/BENCHMARKS.md", "python3 tools/bench_", BENCH),
    ("docs/BENCHMARKS.md", "python3 tools/compress_table.py", BENCH),
    ("docs/BENCHMARKS.md", "python3 tools/make_synthetic.py", BENCH),
    ("docs/BENCHMARKS.md", "python3 tools/plan_calibration.py", BENCH),
    ("docs/BENCHMARKS.md", "python3 tools/quality_plot.py", BENCH),
    ("docs/BENCHMARKS.md", "time cp -r /tmp/big", BENCH),
    ("docs/BENCHMARKS.md", "tools/quality.sh", BENCH),
    ("docs/CLI.md", "MCSMOE_KEEP=FOLDER cargo test", BENCH),
    ("docs/CLI.md", "cargo install --path . --features cli", "`.ci/run features` installs it"),
    ("docs/FAMILIES.md", "from transformers import", TORCH),
    ("docs/FAMILIES.md", "python3 tools/sweep_families.py", TORCH),
    ("docs/GUIDE.md", "hf download", "30 GB from the network"),
    ("docs/GUIDE.md", "python convert_hf_to_gguf.py", "a script of llama.cpp"),
    ("docs/GUIDE.md", "vllm serve", "another program, on a graphics card"),
    ("docs/HARDENING.md", "cargo +nightly fuzz", "half an hour, on another compiler"),
    ("docs/MEASUREMENT_LOG.md", "mcsmoe run MODEL TEXT TARGET", BENCH),
    ("docs/WALKTHROUGH.md", "mcsmoe run MODEL TEXT TARGET", "the guide runs it, with other names"),
    ("*", "mcsmoe presets NAME", "docs/CLI.md runs it"),
    ("docs/SCALE.md", "import subprocess", "needs a Ray cluster; its commands are those above it"),
    ("docs/SCALE.md", "mcsmoe assemble", "run by the test of the Kubernetes job"),
    ("docs/STATISTICS.md", "tools/collect_routing.py", TORCH),
    ("*", "cargo bench", BENCH),
    ("*", "cargo build", GATE),
    ("*", "cargo fmt", GATE),
    ("*", "cargo test", GATE),
];

const BENCH: &str = "a measurement: minutes to hours, on a quiet machine";
const GATE: &str = "a gate of `.ci/run`, or a part of one";
const TORCH: &str = "needs Python with torch and transformers";
