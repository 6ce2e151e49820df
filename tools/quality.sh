#!/bin/sh
# quality.sh CALIBRATION EVALUATION KEEP "PRESETS" MODEL...: what every preset costs.
#
# Merges each MODEL to KEEP experts per layer with every preset, calibrated on at most $TOKENS
# (24576) tokens of CALIBRATION, as a stock and a native folder, and evaluates them on EVALUATION,
# another text. Prints rows for docs/quality.csv: nats per token, the share of experts that stayed,
# and of the run that wrote both folders, calibration included, the seconds and the peak of resident
# memory in MB (from /proc; empty elsewhere). $NAME is written in place of the folder's name.
# Needs the examples: cargo build --release --examples. Folders go to $TMPDIR and are removed.
set -eu
if [ $# -lt 5 ]; then
    sed -n '2,9s/^# //p' "$0"
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
# The share of experts that stayed, from the lines of the layers (`layers.0  8→4 …`) that follow the
# folder's name.
kept() {
    layers='s/^[a-z]*\.[0-9]* *\([0-9]*\)→\([0-9]*\) .*/\1 \2/p'
    sed -n "/\/$1\$/,/^parameters/$layers" "$out/log" |
        awk '{ n += $1; m += $2 } END { if (n) printf "%.4g", m / n }'
}
# Runs a command; sets seconds and peak.
measured() {
    start=$(date +%s) peak=
    "$@" &
    while kill -0 $! 2>/dev/null; do
        found=$(sed -n 's/^VmHWM:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$!/status" 2>/dev/null || true)
        peak=${found:-$peak}
        sleep 0.2
    done
    wait $!
    seconds=$(($(date +%s) - start)) peak=${peak:+$((peak * 1024 / 1000000))}
}
echo "model,preset,export,kept,nats,reference_nats,seconds,peak_mb,tokens"
for model in "$@"; do
    name=${NAME:-$(basename "$model")} reference=$(loss "$model")
    for preset in $presets; do
        measured "$bin/merge_then_compress" "$model" "$calibration" "$out/m" "$keep" "$preset" \
            --tokens "${TOKENS:-24576}" > "$out/log"
        tokens=$(sed -n 's/^calibration: \([0-9]*\) tokens.*/\1/p' "$out/log" | head -n 1)
        for export in stock native; do
            [ -d "$out/m/$export" ] || continue
            nats=$(loss "$out/m/$export")
            row="$(kept "$export"),$nats,$reference,$seconds,$peak,$tokens"
            echo "$name,$preset,$export,$row"
        done
        rm -rf "$out/m"
    done
done
