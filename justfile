# The same steps as .ci/run; `just` lists them.

default:
    @just --list

# All gates, as in CI.
ci:
    .ci/run

# Formats the code in place.
fmt:
    cargo fmt --all

# Clippy with warnings denied.
lint:
    .ci/run lint

# Documentation with warnings denied.
doc:
    .ci/run doc

# Unit, integration and documentation tests.
test:
    .ci/run test

# The command-line tool, its tests and pages.
cli:
    .ci/run cli

# Runs every example.
examples:
    .ci/run examples

# The same laws on LAPACK; installs OpenBLAS if it is missing.
lapack:
    .ci/run lapack

# The shaders on a software Vulkan driver, which it installs if it is missing.
gpu:
    .ci/run gpu

# Compiles the benches without running them.
bench-build:
    .ci/run bench

# Runs one bench: just bench assign
bench name:
    cargo bench --locked --bench {{name}}
