#!/usr/bin/env python3
"""compress_table.py CALIBRATION EVALUATION MODEL...: merging, compression, or both?

For every MODEL, at (nearly) the same expert bytes: all experts compressed; merged to each of
--keep, a share of the experts, then compressed; merged only, whose bytes are those of whole
experts, rounded up. Ranks are those of a size budget. Prints nats per token on EVALUATION by
native evaluation, and, with --ranks, the mean change of stable ranks in every layer.

Needs the tool: cargo build --release --features cli. The folders are temporary.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import tempfile

TOOL = pathlib.Path(
    os.environ.get("CARGO_TARGET_DIR", pathlib.Path(__file__).resolve().parent.parent / "target")
) / "release/mcsmoe"


def run(*args):
    command = [str(TOOL), "--json", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def loss(folder, text):
    return find(run("evaluate", folder, text), "nll")


def find(report, key):
    """The first value of a key in nested objects."""
    if isinstance(report, dict):
        if key in report:
            return report[key]
        values = report.values()
        return next((v for v in (find(value, key) for value in values) if v is not None), None)
    return None


class Table:
    def __init__(self, args, model, scratch):
        self.args, self.model, self.scratch = args, model, scratch
        self.name = pathlib.Path(model).name

    def row(self, preset, what, keep, size):
        recipe, folder = self.scratch / "recipe.toml", self.scratch / "folder"
        lines = [f'preset = "{preset}"', 'export = "native"', f"keep = {{ {keep} }}"]
        if size:
            lines.append(f'compress = {{ method = "size", size = {{ percent = {size} }} }}')
        recipe.write_text("\n".join(lines) + "\n")
        run("run", self.model, self.args.calibration, folder, "--recipe", recipe,
            "--tokens", self.args.tokens, "--no-verify")
        report = json.loads((folder / "mcsmoe.json").read_text())
        written = find(report, "expert_bytes")
        share = 100 * written["after"] / written["before"]
        nats = loss(folder, self.args.evaluation)
        print(f"| {self.name} | {preset} | {what} | {share:.1f} % | {nats:.3f} |", flush=True)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        return find(report, "layers")

    def rows(self):
        base = loss(self.model, self.args.evaluation)
        print(f"| {self.name} | | the original | 100.0 % | {base:.3f} |", flush=True)
        ranks, size = [], self.args.percent
        for preset in self.args.presets:
            layers = self.row(preset, "compressed only", "fraction = 1.0", size)
            total = sum(layer["experts"]["before"] for layer in layers)
            for keep in self.args.keep:
                what = f"merged to {100 * keep:.0f} %, then compressed"
                layers = self.row(preset, what, f"fraction = {keep}", size)
                ranks += [(preset, keep, layer) for layer in layers]
            whole = max(len(layers), math.ceil(total * size / 100))
            self.row(preset, "merged only", f"total = {whole}", None)
        return ranks

    def print_ranks(self, ranks):
        for preset, keep, layer in ranks:
            found = (layer.get("compression") or {}).get("stable_rank")
            if found:
                print(f"| {self.name} | {preset} | {100 * keep:.0f} % | {layer['layer']} | "
                      f"{found['original']:.1f} | {found['merged']:.1f} | "
                      f"{found['compressed']:.1f} | {100 * found['merging']:+.1f} % | "
                      f"{100 * found['compressing']:+.1f} % |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--percent", type=float, default=20.0, help="of the expert bytes [20]")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5], help="[0.75 0.5]")
    parser.add_argument("--presets", nargs="+", default=["m-smoe", "fast"], help="[m-smoe fast]")
    parser.add_argument("--tokens", type=int, default=24576, help="of calibration, most [24576]")
    parser.add_argument("--ranks", action="store_true", help="print stable ranks, layer by layer")
    args = parser.parse_args()
    print("| model | preset | | expert bytes | nats per token |\n|---|---|---|---|---|")
    ranks = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            table = Table(args, model, pathlib.Path(scratch))
            ranks.append((table, table.rows()))
    if args.ranks:
        print("\n| model | preset | kept | layer | stable rank before | merged | compressed | "
              "merging | compressing |\n|---|---|---|---|---|---|---|---|---|")
        for table, found in ranks:
            table.print_ranks(found)


if __name__ == "__main__":
    main()
