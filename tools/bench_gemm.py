#!/usr/bin/env python3
"""Gain products of this crate against numpy's BLAS (OpenBLAS), same shapes, same run, in turn.

    python3 tools/bench_gemm.py [--threads 1,2] [--rounds 3]

Prints GFLOP/s of the least time of all rounds and the ratio. numpy runs in a process of its own per
round, as this crate's does, so that both take their number of threads from the environment.
"""

import argparse
import json
import os
import subprocess
import sys

OURS = ["cargo", "bench", "--quiet", "--bench", "peers", "--", "gemm"]
SHAPES = [(768, 2048, 768), (1408, 2048, 1408), (2048, 2048, 2048), (4096, 4096, 4096)]
NUMPY = """
import numpy as np, sys, time
m, k, n = map(int, sys.argv[1:])
a, b = (np.random.default_rng(0).standard_normal(s).astype("f4") for s in ((m, k), (n, k)))
out, best = np.empty((m, n), "f4"), float("inf")
for _ in range(8):
    start = time.perf_counter()
    np.matmul(a, b.T, out=out)
    best = min(best, time.perf_counter() - start)
print(best)
"""


def run(command, threads):
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, str(threads))
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("threads  m x k x n            crate  numpy  ratio   (GFLOP/s)")
    for threads in map(int, args.threads.split(",")):
        for shape in SHAPES:
            m, k, n = shape
            size = [str(x) for x in shape]
            ours = theirs = float("inf")
            for _ in range(args.rounds):
                theirs = min(theirs, float(run([sys.executable, "-c", NUMPY, *size], threads)))
                ours = min(ours, json.loads(run([*OURS, *size], threads))["seconds"])
            flops = 2e-9 * m * k * n
            rates = f"{flops / ours:6.1f} {flops / theirs:6.1f} {theirs / ours:6.2f}"
            print(f"{threads:7}  {m:5} x {k:5} x {n:5}  {rates}")


if __name__ == "__main__":
    main()
