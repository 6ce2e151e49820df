#!/usr/bin/env python3
"""sweep_families.py [FAMILY...] [--keep-folders DIR] [--markdown]: merges tiny checkpoints of
every family in transformers, and loads what comes out.

For each family of tools/tiny_families.py a random checkpoint, in which every second expert is its
neighbour with the hidden units in another order, is saved by transformers. Statistics are collected
by tools/collect_routing.py. Then
- `merge`: M-SMoE to half of the experts as a stock folder loads in unmodified transformers with no
  missing, unexpected or mismatched tensor, and gives finite logits;
- `prune`: experts and router rows of a pruned stock folder are, as transformers holds them, bit for
  bit those that were kept;
- `expanded`: with the twins merged after alignment, a folder with a copy of each has the logits of
  the original in unmodified transformers, so that alignment and average went along the right axes;
- `native`: so has the native folder, run by its own modeling_mcsmoe.py.
Prints a JSON line for each family. The status is 1 if any fails. Needs what tools/stock.py needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import check_native
import collect_routing
import stock
import tiny_families as tiny
import torch
from safetensors.torch import save_file

EXAMPLE = ["cargo", "run", "--quiet", "--example", "merge_then_compress", "--"]
TWINS = """
preset = "hc-smoe"
measure_error = false
[similarity]
metric = "router-weights"
[align]
method = "weight-matching"
when = "in_groups"
[keep]
experts = 4
"""
# f32 sums of some 100 terms in another order, through a few layers.
TOLERANCE = 1e-4


def merge(source, stats, target, recipe):
    path = target.with_suffix(".toml")
    path.write_text(recipe)
    done = subprocess.run(
        EXAMPLE + [str(source), str(stats), str(target), str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"merge: {done.stderr.strip().splitlines()[-1]}")


def halves(preset, export):
    return f'preset = "{preset}"\nexport = "{export}"\n[keep]\nexperts = {tiny.N // 2}\n'


def groups(folder):
    """Members of each layer's groups, dominant first, by the report."""
    report = json.loads((folder / "mcsmoe.json").read_text())
    return {
        line["layer"]: [(group["dominant"], group["members"]) for group in line["groups"]]
        for line in report["layers"]
    }


def collect(model, path):
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 99, (8, 64), generator=draw)
    decoder = ids.flip(1) if model.config.is_encoder_decoder else None
    tensors, meta = collect_routing.collect(model, ids, decoder, 512)
    save_file(tensors, path, metadata=meta)


def rows(tensor, kept):
    """The kept experts' part of a tensor whose first axis holds all experts."""
    size = tensor.shape[0] // tiny.N
    return torch.cat([tensor[i * size : (i + 1) * size] for i in kept])


def check_pruned(original, folder):
    """Whether a pruned model holds the kept experts and router rows and nothing else."""
    pruned, kept = stock.load(folder), groups(folder)
    pairs = zip(tiny.blocks(original), tiny.blocks(pruned), strict=True)
    for (name, a, router_a), (_, b, router_b) in pairs:
        of = [dominant for dominant, _ in kept[collect_routing.layer_name(name)]]
        if isinstance(a.experts, torch.nn.ModuleDict):
            for slot, expert in enumerate(of):
                state = b.experts[f"expert_{slot}"].state_dict()
                for key, tensor in a.experts[f"expert_{expert}"].state_dict().items():
                    assert torch.equal(tensor, state[key]), f"{name}: expert {expert} {key}"
        else:
            for key, tensor in a.experts.state_dict().items():
                assert torch.equal(rows(tensor, of), b.experts.state_dict()[key]), f"{name}: {key}"
        weights = collect_routing.owner(router_a).weight, collect_routing.owner(router_b).weight
        assert torch.equal(rows(weights[0], of), weights[1]), f"{name}: router"
        for (key, tensor), (_, other) in zip(buffers(a), buffers(b), strict=True):
            assert torch.equal(tensor.flatten()[of], other.flatten()), f"{name}: {key}"


def buffers(block):
    found = [*block.named_buffers(), *block.named_parameters()]
    return [(key, t) for key, t in found if "bias" in key and "experts" not in key]


@torch.inference_mode()
def logits(model):
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 99, (2, 48), generator=draw)
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    return model(**given, use_cache=False).logits.float()


def same(found, expected):
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE, f"logits differ by {difference}"
    return difference


def sweep(family, root):
    """Builds, merges and checks one family; a line of the table."""
    source, stats = root / "source", root / "stats.safetensors"
    model = tiny.build(family)
    model.save_pretrained(source)
    model = stock.load(source)
    expected = logits(model)
    assert expected.isfinite().all(), "the original's logits are not finite"
    collect(stock.load(source), stats)
    line = {"family": family, "max_abs_logit": expected.abs().max().item()}
    merge(source, stats, root / "stock", halves("m-smoe", "stock"))
    assert logits(stock.load(root / "stock")).isfinite().all(), "logits are not finite"
    line["merge"] = True
    merge(source, stats, root / "pruned", halves("reap", "stock"))
    check_pruned(model, root / "pruned")
    line["prune"] = True
    for export in ("expanded", "native"):
        merge(source, stats, root / export, f'export = "{export}"' + TWINS)
        found = [sorted(members) for of in groups(root / export).values() for _, members in of]
        assert all(a + 1 == b for a, b in found), f"{export}: not the twins: {found}"
        if export == "native" and family.startswith("llama4"):
            line["native"] = "refused: weights on inputs"
            continue
        load = stock.load if export == "expanded" else check_native.load
        line[export] = same(logits(load(root / export, dtype=torch.float32)), expected)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--keep-folders", type=Path, metavar="DIR")
    args = parser.parse_args()
    failed = False
    for family in args.families or tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            root = args.keep_folders / family if args.keep_folders else Path(scratch)
            root.mkdir(parents=True, exist_ok=True)
            try:
                line = sweep(family, root)
            except (Exception, SystemExit) as error:
                failed = True
                if args.keep_folders:
                    traceback.print_exc()
                line = {"family": family, "error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
