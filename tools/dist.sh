#!/bin/sh
# dist.sh: builds the tool and packs it with its licence and documents, for publishing.
#
# Writes mcsmoe-VERSION-HOST.tar.gz and its .sha256 into target/dist. The bytes depend on the sources,
# the lock file, the compiler and the host only: paths of the clone and of the registry are mapped to
# fixed ones, and the archive has neither times nor owners nor an order of its own.
set -eu
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
name=mcsmoe-$version-$host
target=${CARGO_TARGET_DIR:-target}
dist=$target/dist
registry=${CARGO_HOME:-$HOME/.cargo}
flags="--remap-path-prefix=$PWD=/mcsmoe --remap-path-prefix=$registry=/cargo"
export RUSTFLAGS="$flags" CARGO_INCREMENTAL=0 SOURCE_DATE_EPOCH=0
cargo build --profile dist --locked --features cli --target "$host"
rm -rf "$dist/$name"
mkdir -p "$dist/$name"
cp "$target/$host/dist/mcsmoe" LICENSE README.md CHANGELOG.md CITATION.cff "$dist/$name"
cp -R docs "$dist/$name/docs"
tar -C "$dist" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=go=rX,u+w \
    -cf - "$name" | gzip -9n > "$dist/$name.tar.gz"
(cd "$dist" && sha256sum "$name.tar.gz" > "$name.tar.gz.sha256" && cat "$name.tar.gz.sha256")
