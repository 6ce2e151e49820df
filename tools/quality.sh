#!/bin/sh
# quality.sh CALIBRATION EVALUATION KEEP "PRESETS" MODEL...: what every preset costs, as a table.
#
# Merges each MODEL to KEEP experts per layer with every preset, calibrated on at most $TOKENS
# (24576) tokens of CALIBRATION, as a stock and a native folder, and evaluates them on EVALUATION,
# another text. Prints nats per token, and the seconds that both folders took, calibration included.
# Needs the examples: cargo build --release --examples. Folders go to $TMPDIR and are removed.
set -eu
if [ $# -lt 5 ]; then
    sed -n '2,7s/^# //p' "$0"
    exit 2
fi
bin="${CARGO_TARGET_DIR:-$(dirname "$0")/../target}/release/examples"
for program in merge_then_compress evaluate; do
    [ -x "$bin/$program" ] || { echo "no $bin/$program" >&2; exit 1; }
done
calibration=$1 evaluation=$2 keep=$3 presets=$4
shift 4
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
loss() {
    "$bin/evaluate" "$1" "$evaluation" | sed -n 's/.*"nll": \([0-9.]*\).*/\1/p' | head -n 1
}
echo "| model | preset | stock | native | seconds |"
echo "|---|---|---|---|---|"
for model in "$@"; do
    echo "| $(basename "$model") | none | $(loss "$model") | | |"
    for preset in $presets; do
        start=$(date +%s)
        "$bin/merge_then_compress" "$model" "$calibration" "$out/m" "$keep" "$preset" \
            --tokens "${TOKENS:-24576}" > "$out/log"
        seconds=$(($(date +%s) - start))
        stock=$(loss "$out/m/stock") native=$(loss "$out/m/native")
        echo "| $(basename "$model") | $preset | $stock | $native | $seconds |"
        rm -rf "$out/m"
    done
done
