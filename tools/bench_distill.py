#!/usr/bin/env python
"""An epoch of block distillation in f32: this crate against torch, same shapes, tokens and threads.

    python tools/bench_distill.py [--threads 2] [--rounds 5]

torch trains a router and the experts of one layer, each expert on the tokens that chose it, by its
fused Adam; it judges the held-out tokens once before and once after the epoch, as the crate does.
Rounds alternate between the two, so that a busy machine slows both; the best round of each counts.
Needs torch. One JSON line per shape.
"""
import argparse
import json
import os
import subprocess
import time

import torch
import torch.nn.functional as F

TOKENS, BATCH = 8192, 512
HELD_OUT = TOKENS // 8
SHAPES = {
    "mixtral-4e": (128, 256, 4, 2),
    "qwen3moe-16e": (128, 64, 16, 4),
    "wide-8e": (256, 512, 8, 2),
}
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


class Block(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        d, f, n, self.k = shape
        new = lambda rows, cols: torch.nn.Parameter(torch.randn(rows, cols) * cols**-0.5)
        self.router = new(n, d)
        self.gate = torch.nn.ParameterList(new(f, d) for _ in range(n))
        self.up = torch.nn.ParameterList(new(f, d) for _ in range(n))
        self.down = torch.nn.ParameterList(new(d, f) for _ in range(n))

    def forward(self, x):
        p = torch.softmax(x @ self.router.T, -1)
        w, chosen = p.topk(self.k, -1)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down)):
            token, slot = torch.where(chosen == e)
            if len(token) == 0:
                continue
            rows = x[token]
            hidden = F.silu(rows @ gate.T) * (rows @ up.T)
            out.index_add_(0, token, (hidden @ down.T) * w[token, slot, None])
        return out


def torch_seconds(shape, x, targets):
    torch.manual_seed(1)
    student = Block(shape)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    steps = TOKENS // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    held_out = slice(TOKENS, TOKENS + HELD_OUT)

    def judge():
        with torch.no_grad():
            return ((student(x[held_out]) - targets[held_out]) ** 2).sum().item()

    start = time.perf_counter()
    judge()
    for rows in torch.randperm(TOKENS).split(BATCH):
        optimiser.zero_grad()
        ((student(x[rows]) - targets[rows]) ** 2).mean().backward()
        optimiser.step()
        schedule.step()
    judge()
    return time.perf_counter() - start


def crate_seconds(name, threads):
    command = ["cargo", "bench", "--quiet", "--bench", "recover", "--",
               f"recover/distill/{name}$", "--warm-up-time", "1", "--measurement-time", "3"]
    env = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    path = os.path.join(target, "criterion", "recover_distill", name, "new", "sample.json")
    sample = json.load(open(path))
    return min(t / i for t, i in zip(sample["times"], sample["iters"])) * 1e-9


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        x = torch.randn(TOKENS + HELD_OUT, shape[0])
        with torch.no_grad():
            targets = Block(shape)(x)
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(crate_seconds(name, args.threads))
            theirs.append(torch_seconds(shape, x, targets))
        best = min(ours), min(theirs)
        print(json.dumps({
            "shape": name, "threads": args.threads, "crate_s": round(best[0], 4),
            "torch_s": round(best[1], 4), "ratio": round(best[1] / best[0], 2),
        }), flush=True)


if __name__ == "__main__":
    main()
