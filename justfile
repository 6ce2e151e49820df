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

# The tool, LAPACK and the shaders; installs OpenBLAS and a software Vulkan driver if missing.
features:
    .ci/run features

# Runs every example.
examples:
    .ci/run examples

# Compiles the benches without running them.
bench-build:
    .ci/run bench

# Builds the package that a registry would get.
package:
    .ci/run package

# Runs one bench: just bench assign
bench name:
    cargo bench --locked --bench {{name}}

# The tool as an archive with its checksum, the same bytes from every clone: target/dist.
dist:
    tools/dist.sh
