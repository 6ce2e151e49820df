#!/usr/bin/env python3
"""sweep_families.py [FAMILY...] [--keep-folders DIR]: merges tiny checkpoints of every family in
transformers, and loads what comes out.

For each family of tools/tiny_families.py a random checkpoint, in which every second expert is its
neighbour with the hidden units in another order, is saved by transformers. Statistics are collected
by tools/collect_routing.py. Then
- `merge`: M-SMoE to half of the experts as a stock folder loads in unmodified transformers with no
  missing, unexpected or mismatched tensor, and gives finite logits;
- `prune`: experts and router rows of a pruned stock folder are, as transformers holds them, bit for
  bit those that were kept;
- `expanded`: with the twins merged after alignment, a folder with a copy of each has the logits of
  the original in unmodified transformers, so that alignment and average went along the right axes;
- `unaligned`: the same without alignment has not, or the check would prove nothing;
- `native`: the native folder, run by its own modeling_mcsmoe.py, has the logits of the original;
- `routed`: on the statistics' samples this crate's experts and routing rule give what the routed
  experts of transformers gave, but where no rule says how a family routes;
- `ours`: this crate's forward pass, where it has one, has them too.
For quantised sources, MXFP4 and FP8, folders merged from them and from the same values in bf16 are
equal bit for bit (`packed`). NLLB-MoE runs with all of its experts (tools/tiny_families.py).
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
import pack_families
import stock
import tiny_families as tiny
import torch
from safetensors.torch import save_file

MERGE = ["cargo", "run", "--quiet", "--features", "cli", "--", "--quiet", "merge"]
ROUTED = ["cargo", "bench", "--quiet", "--bench", "peers", "--", "routed"]
TWINS = """
preset = "hc-smoe"
measure_error = false
[similarity]
metric = "router-weights"
[keep]
experts = 4
[align]
"""
ALIGN = """method = "weight-matching"
when = "in_groups"
"""
# Families with a forward pass of this crate.
NATIVE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "kimi_k2")
NATIVE += ("glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe", "minimax_m2")
NATIVE += ("switch_transformers",)
# Families whose routing is not quite one of this crate's rules.
NO_RULE = ("phimoe", "llama4_text")
# f32 sums of some 100 terms in another order, through a few layers.
TOLERANCE = 1e-4


def load(folder, family, run=stock.load):
    """A model of a stock or native folder."""
    path = folder / "config.json"
    text = path.read_text()
    if run is stock.load and family in tiny.SAME:
        path.write_text(text.replace(f'"{family}"', f'"{tiny.SAME[family]}"'))
    model = tiny.repair(run(folder, dtype=torch.float32))
    path.write_text(text)
    return model


def merge(source, stats, target, recipe):
    path = target.with_suffix(".toml")
    path.write_text(recipe)
    done = subprocess.run(
        MERGE + [str(source), str(stats), str(target), "--recipe", str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"merge: {done.stderr.strip().splitlines()[-1]}")


def routed(source, stats):
    """The largest relative error of a layer's routed experts on the samples."""
    done = subprocess.run(ROUTED + [str(source), str(stats)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    return max(json.loads(done.stdout).values())


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


def check_pruned(original, pruned, kept):
    """A pruned model holds the kept experts and router rows and nothing else."""
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


def tokens(model):
    ids = torch.randint(3, 99, (2, 48), generator=torch.Generator().manual_seed(9))
    given = {"input_ids": ids.int()}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1).int()
    return given


def logits(model):
    return check_native.theirs(model, tokens(model))


def same(found, expected):
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE, f"logits differ by {difference}"
    return difference


def sweep(family, root):
    """Builds, merges and checks one family; a line of the table."""
    source, stats = root / "source", root / "stats.safetensors"
    tiny.build(family).save_pretrained(source, save_original_format=family not in tiny.FUSED)
    if family in tiny.SAME:
        config = (source / "config.json").read_text()
        (source / "config.json").write_text(config.replace(f'"{tiny.SAME[family]}"', f'"{family}"'))
    model = load(source, family)
    expected = logits(model)
    assert expected.isfinite().all(), "the original's logits are not finite"
    collect(load(source, family), stats)
    line = {"family": family, "max_abs_logit": expected.abs().max().item()}
    line["routed"] = routed(source, stats)
    assert line["routed"] < 1e-5 or family in NO_RULE, f"routed experts differ: {line['routed']}"
    if family in NATIVE:
        line["ours"] = same(check_native.ours(source, tokens(model)), expected)
    merge(source, stats, root / "stock", halves("m-smoe", "stock"))
    assert logits(load(root / "stock", family)).isfinite().all(), "logits are not finite"
    line["merge"] = True
    merge(source, stats, root / "pruned", halves("reap", "stock"))
    check_pruned(model, load(root / "pruned", family), groups(root / "pruned"))
    line["prune"] = True
    line["expanded"] = same(twins(source, stats, root, "expanded", family), expected)
    found = twins(source, stats, root, "expanded", family, 'method = "identity"\n')
    line["unaligned"] = (found - expected).abs().max().item()
    assert line["unaligned"] > 100 * TOLERANCE, f"alignment changes {line['unaligned']}"
    if family.startswith("llama4"):
        line["native"] = "refused: weights are on inputs"
    else:
        found = twins(source, stats, root, "native", family, run=check_native.load)
        line["native"] = same(found, expected)
    return line


def twins(source, stats, root, export, family, align=ALIGN, run=stock.load):
    """Logits of an export in which every two twins are one."""
    target = root / (export if align == ALIGN else "unaligned")
    merge(source, stats, target, f'export = "{export}"' + TWINS + align)
    found = [sorted(members) for of in groups(target).values() for _, members in of]
    expected = [[i, i + 1] for i in range(0, tiny.N, 2)] * (len(found) * 2 // tiny.N)
    assert sorted(found) == sorted(expected), f"{export}: not the twins: {found}"
    return logits(load(target, family, run))


def sweep_packed(name, root):
    """Merges a quantised checkpoint and the same values in bf16."""
    family, pack, keys = pack_families.PACKED[name]
    plain, packed, stats = root / "source", root / "packed", root / "stats.safetensors"
    pack(tiny.build(family, twin=False, **keys), plain, packed)
    collect(load(plain, family), stats)
    line = {"family": name}
    for export in ("stock", "native"):
        for source in (plain, packed):
            target = root / f"{source.name}-{export}"
            merge(source, stats, target, halves("m-smoe", export))
        pack_families.equal(root / f"source-{export}", root / f"packed-{export}")
    found = logits(load(root / "packed-stock", family))
    assert found.isfinite().all(), "logits are not finite"
    line["merge"] = True
    found = logits(load(root / "packed-native", family, check_native.load))
    assert found.isfinite().all(), "logits are not finite"
    return line | {"packed": True}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--keep-folders", type=Path, metavar="DIR")
    args = parser.parse_args()
    failed = False
    for family in args.families or [*tiny.FAMILIES, *pack_families.PACKED]:
        with tempfile.TemporaryDirectory() as scratch:
            root = args.keep_folders / family if args.keep_folders else Path(scratch)
            root.mkdir(parents=True, exist_ok=True)
            try:
                run = sweep_packed if family in pack_families.PACKED else sweep
                line = run(family, root)
            except (Exception, SystemExit) as error:
                failed = True
                if args.keep_folders:
                    traceback.print_exc()
                line = {"family": family, "error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
