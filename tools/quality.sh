#!/bin/sh
# quality.sh CALIBRATION EVALUATION KEEP "PRESETS" MODEL...: what every preset costs.
#
# Merges each MODEL to KEEP experts per layer with every preset, calibrated on at most $TOKENS
# (24576) tokens of CALIBRATION, as a stock and a native folder, and evaluates them on EVALUATION,
# another text. Prints rows for docs/quality.csv: nats per token, the share of experts that stayed,
# and of the run that wrote the folder, calibration included, the seconds and the peak of resident
# memory in MB (from /proc; empty elsewhere). $NAME is written in place of the folder's name.
# Needs the tool: cargo build --release --features cli. Folders go to $TMPDIR and are removed.
set -eu
if [ $# -lt 5 ]; then
    sed -n '2,9s/^# //p' "$0"
    exit 2
fi
tool="${CARGO_TARGET_DIR:-$(dirname "$0")/../target}/release/mcsmoe"
[ -x "$tool" ] || { echo "no $tool" >&2; exit 1; }
calibration=$1 evaluation=$2 keep=$3 presets=$4
shift 4
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
loss() {
    "$tool" --json evaluate "$1" "$evaluation" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["nll"])'
}
# The share of experts that stayed, and the calibration tokens, from a report.
kept() {
    python3 -c 'import json, sys
report = json.load(open(sys.argv[1]))
print("%.4g" % (report["experts"]["after"] / report["experts"]["before"]), report["tokens"] or "")
' "$1"
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
        for export in stock native; do
            # Factors have no stock folder.
            [ "$preset $export" != "mc-smoe-budget stock" ] || continue
            measured "$tool" run "$model" "$calibration" "$out/m" --keep "$keep" --quiet \
                --preset "$preset" --export "$export" --tokens "${TOKENS:-24576}" --no-verify \
                > "$out/log"
            nats=$(loss "$out/m")
            set_of=$(kept "$out/m/mcsmoe.json") share=${set_of% *} tokens=${set_of#* }
            echo "$name,$preset,$export,$share,$nats,$reference,$seconds,$peak,$tokens"
            rm -rf "$out/m"
        done
    done
done
