#!/usr/bin/env python3
"""check_exports.py MODEL_DIR [--expect-experts M]: does unmodified transformers accept a folder?

Fails on any missing, unexpected or mismatched tensor, on a shard index that disagrees with its
shards, on a router whose rows are not its experts, and on non-finite logits. Prints JSON.
"""

import argparse
import json
import sys

from stock import load, logits, moe_blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--expect-experts", type=int, metavar="M", help="experts in every layer")
    args = parser.parse_args()
    model = load(args.model)
    blocks = list(moe_blocks(model))
    problems = [f"{name}: {n} experts, {rows} router rows" for name, n, rows in blocks if n != rows]
    if not blocks:
        problems.append("no MoE block found")
    if args.expect_experts is not None:
        wrong = [f"{name}: {n} experts" for name, n, _ in blocks if n != args.expect_experts]
        problems += [f"{line}, expected {args.expect_experts}" for line in wrong]
    out = logits(model)
    if not out.isfinite().all():
        problems.append("non-finite logits")
    report = {
        "model": type(model).__name__,
        "params": sum(p.numel() for p in model.parameters()),
        "experts": {name: n for name, n, _ in blocks},
        "mean_logit": out.mean().item(),
        "problems": problems,
    }
    print(json.dumps(report, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
