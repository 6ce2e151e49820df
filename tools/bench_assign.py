#!/usr/bin/env python3
"""Compares the assignment solver with scipy.optimize.linear_sum_assignment, one thread each.

    python3 tools/bench_assign.py [--sizes 1408,2048,4096] [--repeats 5] [--rank1] [--hard]

Needs NumPy and SciPy. Both solvers get the same float32 matrix in the same run, in turn, and the
least time counts, of `repeats` for SciPy and of 3 in each of `repeats` processes for ours (the
first of which is cold): other programs can only make a run slower. SciPy maximises and is
given the float32 matrix; its conversion to float64 is part of its time, as it is for a caller.

  unrelated  A B^T, A and B normal, (n, d) with d = min(2048, 2 n)
  noisy S    B is a permutation of the rows of A plus S times normal noise
  rank1 S    u v^T plus S times normal noise (--rank1: SciPy takes minutes at 4096)
  hard       ties, blocks, points on a line or in the plane (--hard)
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

OURS = ["cargo", "bench", "--quiet", "--bench", "peers", "--", "assign"]


def matrix(kind, n):
    """The gains of one case; the seed is the size."""
    name, _, size = kind.partition(" ")
    rng, d = np.random.default_rng(n), min(2048, 2 * n)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    if name == "unrelated":
        return normal(n, d) @ normal(n, d).T
    if name == "noisy":
        a = normal(n, d)
        return a @ (a[rng.permutation(n)] + np.float32(size) * normal(n, d)).T
    if name == "rank1":
        return np.outer(normal(n), normal(n)) + np.float32(size) * normal(n, n)
    if name == "constant":
        return np.full((n, n), 3, np.float32)
    if name == "rounded":
        return np.round(normal(n, n))
    if name == "offset":
        return normal(n, n) + np.float32(1e6)
    if name == "blocks":
        return np.kron(normal(n // 128, n // 128), np.ones((128, 128), np.float32))
    if name == "line":
        return -np.abs(normal(n, 1) - normal(1, n))
    if name == "plane":
        return normal(n, 2) @ normal(2, n)
    raise ValueError(kind)


def ours(path, n, gap):
    """Seconds, objective and certified gap of one solve by this crate."""
    command = [*OURS, path, str(n), str(gap), "3"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(kind, n, repeats):
    """(SciPy, exact, within 0.1 %): least seconds of each."""
    gain = matrix(kind, n)
    best = [math.inf] * 3
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        gain.tofile(file.name)
        for _ in range(repeats):
            start = time.perf_counter()
            rows, columns = linear_sum_assignment(gain, maximize=True)
            best[0] = min(best[0], time.perf_counter() - start)
            optimum = float(gain[rows, columns].astype(np.float64).sum())
            for at, gap in [(1, 0.0), (2, 1e-3)]:
                result = ours(file.name, n, gap)
                allowed = max(gap, 1e-6) * abs(optimum)
                assert optimum - result["objective"] <= allowed, (kind, n, optimum, result)
                best[at] = min(best[at], result["seconds"])
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1408,2048,4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank1", action="store_true")
    parser.add_argument("--hard", action="store_true")
    options = parser.parse_args()
    sizes = [int(n) for n in options.sizes.split(",")]
    cases = [(kind, n) for kind in ["unrelated", "noisy 8", "noisy 0.5"] for n in sizes]
    rank1 = ["rank1 0", "rank1 1e-3", "rank1 1e-2", "rank1 1e-1"] if options.rank1 else []
    hard = ["constant", "rounded", "offset", "blocks", "line", "plane"] if options.hard else []
    extra = [(kind, n) for kind in rank1 + hard for n in sizes]
    print("gains            n   scipy s   exact s   ratio  0.1 % s   ratio")
    ratios = []
    for kind, n in cases + extra:
        scipy, exact, within = compare(kind, n, options.repeats)
        ratios.append((scipy / exact, scipy / within))
        print(
            f"{kind:11} {n:6} {scipy:9.4f} {exact:9.4f} {scipy / exact:7.1f}"
            f" {within:8.4f} {scipy / within:7.1f}",
            flush=True,
        )
    logs = [map(math.log, column) for column in zip(*ratios[: len(cases)])]
    means = [math.exp(sum(column) / len(cases)) for column in logs]
    print(f"geometric mean of unrelated and noisy: {means[0]:.1f}, within 0.1 %: {means[1]:.1f}")


if __name__ == "__main__":
    main()
