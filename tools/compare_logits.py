#!/usr/bin/env python3
"""compare_logits.py A B [--tolerance X]: largest logit difference of two folders on fixed tokens.

For exports that must not change the function: an expanded export against the original semantics,
or a run with as many groups as experts against its input. Both are computed in f32 from the stored
weights. With --tolerance the exit status is 1 when the difference is above X. Prints JSON.
"""

import argparse
import json
import sys

from stock import load, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--tolerance", type=float, metavar="X")
    args = parser.parse_args()
    a, b = (logits(load(folder)) for folder in (args.a, args.b))
    if a.shape != b.shape:
        raise SystemExit(f"logits of different shapes: {tuple(a.shape)} and {tuple(b.shape)}")
    difference = (a - b).abs()
    agree = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    report = {
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "same_best_token": agree,
        "max_abs_logit": a.abs().max().item(),
    }
    print(json.dumps(report, indent=2))
    # Negated so that NaN fails.
    failed = args.tolerance is not None and not report["max_abs_difference"] <= args.tolerance
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
