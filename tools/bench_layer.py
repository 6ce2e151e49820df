#!/usr/bin/env python3
"""bench_layer.py DIR [--gains-only]: one layer merged with numpy and scipy, timed by phase.

A peer for this crate's benchmarks: M-SMoE with weight matching on one layer of the shape of
Qwen3-30B-A3B (128 experts, d_ff 768, d_model 2048, bf16), 64 experts kept. Read safetensors; join
every expert to the most similar of the most used, by the cosine of router logits; for every
absorbed expert one matrix product of f32 gains and one scipy.optimize.linear_sum_assignment;
average by usage; write safetensors with one router row per kept expert. The first run makes the
input, DIR/model and DIR/model.stats.safetensors (about 1.2 GB, seeded); the result goes to
DIR/merged. Both lie in the page cache afterwards: run twice and take the second. BLAS runs on
--threads threads; scipy's assignment has no threads.

--gains-only times the gain products alone: (f × 3d) · (3d × f) in f32 by numpy's BLAS.
Needs numpy and scipy. Prints JSON, seconds.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--gains-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--d-ff", type=int, default=768)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.layers, args.family, args.dtype = 1, "qwen3_moe", "bf16"
    args.vocab, args.shard_bytes = 256, 1 << 40
    args.heads, args.kv_heads, args.head_dim = 4, 2, 32
    return args


ARGS = arguments()
# Read by the BLAS when numpy is loaded.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = str(ARGS.threads)

import numpy as np  # noqa: E402
from make_synthetic import as_f32, config, write_all, write_safetensors  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

EXPERT = "model.layers.0.mlp.experts.{}.{}.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
ROLES = ("gate_proj", "up_proj", "down_proj")
TYPES = {"BF16": "<u2", "F32": "<f4", "I32": "<i4"}


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = {}

    def run(self, phase, work):
        start = time.perf_counter()
        result = work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        return result


def read_safetensors(path):
    """Every tensor, read into memory; bf16 as its bits."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = np.fromfile(file, np.uint8)
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        start, end = t["data_offsets"]
        tensors[name] = data[start:end].view(TYPES[t["dtype"]]).reshape(t["shape"])
    return tensors


def to_bf16(x):
    """Bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def units(tensors, expert):
    """(d_ff, 3·d_model): every hidden unit's gate row, up row and down column, in f32."""
    gate, up, down = (as_f32(tensors[EXPERT.format(expert, role)]) for role in ROLES)
    return np.concatenate([gate, up, down.T], axis=1)


def group(stats, keep):
    """{kept expert: members}, the kept one first."""
    counts = stats["layers.0.counts"]
    kept = sorted(np.argsort(-counts, kind="stable")[:keep].tolist())
    logits = stats["layers.0.router_logits"].astype(np.float64)
    logits /= np.linalg.norm(logits, axis=0).clip(1e-30)
    cosine = logits.T @ logits
    groups = {k: [k] for k in kept}
    for e in range(len(counts)):
        if e not in groups:
            groups[kept[int(np.argmax(cosine[kept, e]))]].append(e)
    return groups


def add(total, rows, weight):
    rows *= weight
    total += rows


def merge(tensors, groups, counts, clock):
    """The merged experts' bits by name, numbered by rank of the kept expert."""
    out, width = {}, tensors[ROUTER].shape[1]
    for rank, (kept, members) in enumerate(groups.items()):
        if len(members) == 1:
            for role in ROLES:
                out[EXPERT.format(rank, role)] = tensors[EXPERT.format(kept, role)]
            continue
        reference = clock.run("convert", lambda kept=kept: units(tensors, kept))
        weights = np.maximum(counts[members], 1e-9).astype(np.float64)
        weights /= weights.sum()
        merged = clock.run("average", lambda: reference * np.float32(weights[0]))
        for member, weight in zip(members[1:], weights[1:]):
            target = clock.run("convert", lambda member=member: units(tensors, member))
            gains = clock.run("gains", lambda: reference @ target.T)
            _, order = clock.run("assign", lambda: linear_sum_assignment(gains, maximize=True))
            # A row is a whole hidden unit: gate row, up row and down column move together.
            clock.run("average", lambda: add(merged, target[order], np.float32(weight)))
        parts = clock.run("convert", lambda: to_bf16(merged))
        for role, at in zip(ROLES, range(3)):
            part = parts[:, at * width : (at + 1) * width]
            out[EXPERT.format(rank, role)] = part.T if role == "down_proj" else part
    return out


def write(tensors, merged, groups, target):
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    out[ROUTER] = tensors[ROUTER][list(groups)]
    out.update(merged)
    target.mkdir(exist_ok=True)
    plan = [(name, "BF16", t.shape, t.nbytes) for name, t in out.items()]
    write_safetensors(target / "model.safetensors", plan, out.__getitem__, {"format": "pt"})
    edited = config(ARGS) | {"num_experts": len(groups)}
    edited["num_experts_per_tok"] = min(ARGS.top_k, len(groups))
    (target / "config.json").write_text(json.dumps(edited, indent=2) + "\n")


def gains_only():
    """Time of `experts − keep` gain products on resident f32 operands."""
    rng = np.random.default_rng(ARGS.seed)
    f, d = ARGS.d_ff, ARGS.d_model
    a, b = (rng.standard_normal((f, 3 * d), np.float32) for _ in range(2))
    a @ b.T  # Starts the threads.
    pairs = ARGS.experts - ARGS.keep
    start = time.perf_counter()
    for _ in range(pairs):
        a @ b.T
    seconds = time.perf_counter() - start
    flops = 2 * f * f * 3 * d * pairs
    return {"pairs": pairs, "gains": seconds, "gflop_per_second": flops / seconds / 1e9}


def whole_layer():
    model, statistics = ARGS.dir / "model", ARGS.dir / "model.stats.safetensors"
    if not statistics.exists():
        write_all(ARGS, model)
    clock, start = Clock(), time.perf_counter()
    tensors = clock.run("read", lambda: read_safetensors(model / "model.safetensors"))
    stats = clock.run("read", lambda: read_safetensors(statistics))
    if tensors[ROUTER].shape != (ARGS.experts, ARGS.d_model):
        raise SystemExit(f"{ARGS.dir} holds a layer of another shape")
    groups = clock.run("group", lambda: group(stats, ARGS.keep))
    merged = merge(tensors, groups, stats["layers.0.counts"], clock)
    clock.run("write", lambda: write(tensors, merged, groups, ARGS.dir / "merged"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS.
    return clock.seconds | {
        "total": time.perf_counter() - start,
        "absorbed": ARGS.experts - len(groups),
        "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }


def main():
    seconds = gains_only() if ARGS.gains_only else whole_layer()
    report = {"threads": ARGS.threads, "numpy": np.__version__} | seconds
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
