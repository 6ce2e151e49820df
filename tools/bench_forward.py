#!/usr/bin/env python
"""The MoE block in f32: this crate against torch, same shapes, tokens and number of threads.

    python tools/bench_forward.py [--threads 2] [--rounds 5]

torch runs the transformers class with each of its expert implementations; the fastest counts.
Rounds alternate between the two, so that a busy machine slows both; the best round of each counts.
Needs torch and transformers 5. One JSON line per shape.
"""
import argparse
import json
import os
import subprocess
import time

import torch
import transformers as tf
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

TOKENS = 4096
SHAPES = {"mixtral": (1024, 3584, 8, 2), "qwen": (1024, 384, 64, 8)}
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


def block(shape, implementation):
    d, f, n, k = shape
    config = tf.MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=n,
                              num_experts_per_tok=k)
    config._experts_implementation = implementation
    module = MixtralSparseMoeBlock(config).float().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return module


def torch_seconds(module, x):
    with torch.inference_mode():
        module(x)
        start = time.perf_counter()
        module(x)
        return time.perf_counter() - start


def crate_seconds(name, threads):
    command = ["cargo", "bench", "--quiet", "--bench", "forward", "--", f"forward/moe/cpu/{name}$",
               "--warm-up-time", "1", "--measurement-time", "3"]
    env = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    path = os.path.join(target, "criterion", "forward_moe_cpu", name, "new", "sample.json")
    sample = json.load(open(path))
    return min(t / n for t, n in zip(sample["times"], sample["iters"])) * 1e-9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, shape in SHAPES.items():
        d, f, _, k = shape
        x = torch.randn(1, TOKENS, d)
        modules = {i: block(shape, i) for i in ("eager", "grouped_mm")}
        best, crate = {i: float("inf") for i in modules}, float("inf")
        for _ in range(args.rounds):
            for implementation, module in modules.items():
                best[implementation] = min(best[implementation], torch_seconds(module, x))
            crate = min(crate, crate_seconds(name, args.threads))
        reference = min(best.values())
        flops = 6 * TOKENS * k * d * f
        print(json.dumps({
            "shape": name, "tokens": TOKENS, "threads": args.threads,
            "crate_s": round(crate, 4), "torch_s": {i: round(s, 4) for i, s in best.items()},
            "speedup": round(reference / crate, 3), "crate_gflops": round(flops / crate / 1e9, 1),
            "load": os.getloadavg()[0], "torch": torch.__version__,
        }))


if __name__ == "__main__":
    main()
