#!/usr/bin/env python3
"""Compares the SVDs of this crate with torch.linalg.svd, on the same matrices in the same run.

    python3 tools/bench_svd.py [--shapes 2048x768,4096x1408,14336x4096] [--rank 128] [--repeats 3]

Needs torch. torch uses all cores and gives all singular vectors; of the crate, `full`
does the same on one core, `gram` and `randomized` give the leading `rank` triplets on all cores.
The least time of `repeats` counts (one for torch above 2 s). The residual of each is compared with
the optimum, the root of the squared singular values beyond the rank, by torch.

  decaying  orthonormal factors, singular values (i + 1)^-0.5
  flat      normal entries
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time

import torch

OURS = ["cargo", "bench", "--quiet", "--bench", "peers", "--", "svd"]


def matrix(kind, m, n):
    """An (m, n) float32 matrix; the seed is m."""
    generator = torch.Generator().manual_seed(m)
    normal = lambda rows, cols: torch.randn(rows, cols, generator=generator)
    if kind == "flat":
        return normal(m, n)
    k = min(m, n)
    left = torch.linalg.qr(normal(m, k))[0] * torch.arange(1, k + 1) ** -0.5
    return left @ torch.linalg.qr(normal(n, k))[0].T


def peer(a, repeats):
    """Seconds and singular values of torch.linalg.svd."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        values = torch.linalg.svd(a, full_matrices=False)[1]
        best = min(best, time.perf_counter() - start)
        if best > 2:
            break
    return best, values.double()


def ours(path, shape, rank, method, repeats):
    """Seconds and residual of this crate."""
    command = [*OURS, path, *map(str, shape), str(rank), method, str(repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="2048x768,4096x1408,14336x4096")
    parser.add_argument("--kinds", default="decaying,flat")
    parser.add_argument("--methods", default="full,gram,randomized")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("spectrum         shape  torch s  method       ours s   ratio  residual/optimum")
    for kind in options.kinds.split(","):
        for shape in options.shapes.split(","):
            m, n = map(int, shape.split("x"))
            a = matrix(kind, m, n)
            torch_seconds, values = peer(a, options.repeats)
            optimum = float(values[options.rank :].square().sum().sqrt())
            with tempfile.NamedTemporaryFile(suffix=".f32") as file:
                a.numpy().astype("<f4").tofile(file.name)
                for method in options.methods.split(","):
                    repeats = 1 if m * n > 1 << 24 and method != "randomized" else options.repeats
                    result = ours(file.name, (m, n), options.rank, method, repeats)
                    print(
                        f"{kind:10} {shape:>11} {torch_seconds:8.3f}  {method:10}"
                        f" {result['seconds']:8.3f} {torch_seconds / result['seconds']:7.1f}"
                        f"  {result['residual'] / optimum:.5f}",
                        flush=True,
                    )
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak memory of the crate's runs: {usage / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
