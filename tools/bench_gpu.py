#!/usr/bin/env python3
"""Products of this crate on a GPU beside torch on the same card, and a layer beside the CPU.

    python3 tools/bench_gpu.py [--device NAME] [--small]

Prints TFLOP/s of the least time. `whole` includes the matrices' way to the card and back,
`resident` only that of the right matrix and the result. torch multiplies in f32, without TF32, with
both matrices on the card ("kernel") and with their way there and back ("whole"). Refuses a software
renderer unless --small, which shows that the script runs and measures nothing.
"""

import argparse
import json
import subprocess
import sys
import time

OURS = "cargo bench --quiet --features gpu --bench peers -- gpu".split()


def ours(operation, sizes, device):
    command = [*OURS, operation, *map(str, sizes), device]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def torch_times(pairs, rows, cols):
    """Least seconds of the sum of the products: kernels alone, and with every copy."""
    try:
        import torch
    except ImportError:
        return None, None
    if not torch.cuda.is_available():
        return None, None
    torch.backends.cuda.matmul.allow_tf32 = False
    host = [(torch.rand(rows, k), torch.rand(k, cols)) for k in pairs]

    def least(work):
        work()
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    card = [(a.cuda(), b.cuda()) for a, b in host]
    kernel = least(lambda: sum(a @ b for a, b in card))
    whole = least(lambda: sum(a.cuda() @ b.cuda() for a, b in host).cpu())
    return kernel, whole


def rate(flops, seconds):
    return "-" if seconds is None else f"{1e-12 * flops / seconds:.2f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="gpu", help="part of the adapter's name")
    parser.add_argument("--small", action="store_true", help="sizes for a software renderer")
    args = parser.parse_args()
    gemm, (f, d), n = ((4096,) * 3, (14336, 4096), 8)
    if args.small:
        gemm, (f, d), n = ((128,) * 3, (96, 64), 4)
    else:
        listed = subprocess.run([*OURS, "adapters"], capture_output=True, text=True, check=True)
        if all("Software" in line for line in listed.stdout.splitlines()):
            sys.exit(f"no card here, only:\n{listed.stdout}")
    m, k, c = gemm
    found, flops = ours("gemm", gemm, args.device), 2 * m * k * c
    kernel, whole = torch_times([k], m, c)
    print(f"device: {found['device']}; TFLOP/s")
    print(f"gemm {m} x {k} x {c}: whole {rate(flops, found['seconds'])}, resident "
          f"{rate(flops, found['resident'])}; torch kernel {rate(flops, kernel)}, "
          f"whole {rate(flops, whole)}")
    found, flops = ours("gain", (f, d), args.device), 6 * f * d * f
    kernel, whole = torch_times([d, d, d], f, f)
    print(f"gain {f} x {d} x {f}, three products: whole {rate(flops, found['seconds'])}; "
          f"torch kernel {rate(flops, kernel)}, whole {rate(flops, whole)}")
    times = {device: ours("layer", (n, f, d), device)["seconds"] for device in (args.device, "cpu")}
    gpu, cpu = times[args.device], times["cpu"]
    print(f"layer {n} x {f} x {d} to half: {gpu:.1f} s, on the CPU {cpu:.1f} s, "
          f"{cpu / gpu:.1f} x")


if __name__ == "__main__":
    main()
