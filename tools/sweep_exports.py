#!/usr/bin/env python3
"""Merges a checkpoint to every size and loads every stock export with unmodified transformers.

    python3 tools/sweep_exports.py MODEL STATS.safetensors [--presets m-smoe,reap] [--keep 2,4]

For every preset and number of experts M: a stock folder must load with no missing, unexpected or
mismatched tensor and give finite logits; M = N must keep every tensor bit for bit. Where M does not
divide into DeepSeek's routing groups they are flattened. Needs what tools/stock.py needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import stock  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

MERGE = ["cargo", "run", "--quiet", "--features", "cli", "--", "--quiet", "merge"]


def merge(model, stats, target, preset, keep, export, flatten):
    recipe = Path(target).with_suffix(".toml")
    lines = [f'preset = "{preset}"', f'export = "{export}"']
    if flatten:
        lines.append('routing_groups = "flatten"')
    recipe.write_text("\n".join(lines) + f"\n[keep]\nexperts = {keep}\n")
    command = MERGE + [str(model), str(stats), str(target), "--recipe", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(path))
    return found


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--presets", default="m-smoe,hc-smoe,reap,ream,balanced")
    parser.add_argument("--keep", default="")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    n = next(config[key] for key in keys if key in config)
    k = config.get("num_experts_per_tok", 1)
    groups = config.get("n_group") or 1
    sizes = [int(m) for m in args.keep.split(",") if m] or range(k, n + 1)
    failures, loaded = [], 0
    for preset in args.presets.split(","):
        for m in sizes:
            flatten = groups > 1 and (m % groups != 0 or m // groups < 2)
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "stock"
                error = merge(args.model, args.stats, target, preset, m, "stock", flatten)
                if error:
                    failures.append(f"{preset} {m}: {error}")
                    continue
                model = stock.load(target)
                if not torch.isfinite(stock.logits(model, 32)).all():
                    failures.append(f"{preset} {m}: logits are not finite")
                if m == n and not flatten and not same(args.model, target):
                    failures.append(f"{preset} {m}: M = N changed a tensor")
                loaded += 1
    print(json.dumps({"model": args.model.name, "loaded": loaded, "failures": failures}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
