#!/usr/bin/env python3
"""How long calibration takes and how much memory it needs, from measured rates.

    python3 tools/plan_calibration.py --gflops C --read-gbps R [--tokens 16384,65536]

C: 10^9 floating-point operations per second of a whole layer; R: 10^9 bytes in f32 per second of
reading a layer and turning it into f32. Both come from two runs of `mcsmoe calibrate` on one
checkpoint, whose seconds per layer differ by their tokens alone:

    C = F (t2 - t1) / (s2 - s1)        R = B / (s1 - F t1 / C)

with F the operations per token and layer and B the bytes of a layer in f32. `--fit` does it for the
checkpoint of docs/BENCHMARKS.md. Then, over all layers and for t tokens,

    time = sum_l B_l / R + t F_l / C
    F_l  = 2 (parameters that a token meets) + 2 w h (d_qk + d_v)      w: window, h: heads
    peak = max_l B_l (1 + bytes on disk / 4) + hidden states 4 t d (2 GiB at most) + 0.4 GB

A recipe that needs expert outputs (mean outputs, norms, REAP) sends tokens through the routed
experts twice. Standard library only.
"""
import argparse

WINDOW = 512


def gqa(d, heads, kv_heads, width):
    return {"params": d * width * (2 * heads + 2 * kv_heads), "scores": heads * 2 * width}


def mla(d, heads, q_rank, kv_rank, nope, rope, v):
    params = d * (q_rank + kv_rank + rope) + q_rank * heads * (nope + rope)
    params += kv_rank * heads * (nope + v) + heads * v * d
    return {"params": params, "scores": heads * (nope + rope + v)}


# Layers: sparse and dense; widths; bytes per value on disk.
MODELS = {
    "Mixtral-8x7B": dict(d=4096, f=14336, n=8, k=2, sparse=32, disk=2,
                         attention=gqa(4096, 32, 8, 128)),
    "Qwen3-30B-A3B": dict(d=2048, f=768, n=128, k=8, sparse=48, disk=2,
                          attention=gqa(2048, 32, 4, 128)),
    "DeepSeek-V3": dict(d=7168, f=2048, n=256, k=8, shared=1, sparse=58, dense=3, dense_f=18432,
                        disk=1, attention=mla(7168, 128, 1536, 512, 128, 64, 128)),
}  # fmt: skip
FITTED = MODELS["Mixtral-8x7B"]  # The checkpoint that is measured has its layers.


def layer(m, passes=1, window=WINDOW):
    """Bytes in f32 and operations per token of a sparse layer, then of a dense one."""
    d, attention = m["d"], m["attention"]
    expert, shared = 3 * d * m["f"], m.get("shared", 0)
    router, dense = m["n"] * d, 3 * d * m.get("dense_f", 0)
    scores = 2 * window * attention["scores"]
    held = 4 * (attention["params"] + router + (m["n"] + shared) * expert)
    met = attention["params"] + router + (passes * m["k"] + shared) * expert
    return (held, 2 * met + scores), (4 * (attention["params"] + dense),
                                      2 * (attention["params"] + dense) + scores)


def plan(m, tokens, passes, gflops, read):
    (held, work), (dense_held, dense_work) = layer(m, passes)
    dense = m.get("dense", 0)
    seconds = m["sparse"] * (held / read + tokens * work / gflops) / 1e9
    seconds += dense * (dense_held / read + tokens * dense_work / gflops) / 1e9
    states = min(4 * tokens * m["d"], 2 << 30)
    return seconds, held * (1 + m["disk"] / 4) / 1e9, states / 1e9


def fit(text):
    """Rates from `t1:s1,t2:s2`: tokens and seconds per layer."""
    (t1, s1), (t2, s2) = (tuple(map(float, pair.split(":"))) for pair in text.split(","))
    (held, work), _ = layer(FITTED)
    gflops = work * (t2 - t1) / (s2 - s1) / 1e9
    return gflops, held / (s1 - work * t1 / gflops / 1e9) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gflops", type=float)
    parser.add_argument("--read-gbps", type=float)
    parser.add_argument("--fit", help="t1:s1,t2:s2, instead of the two rates")
    parser.add_argument("--tokens", default="16384,65536")
    args = parser.parse_args()
    gflops, read = fit(args.fit) if args.fit else (args.gflops, args.read_gbps)
    print(f"C = {gflops:.0f} GFLOP/s, R = {read:.2f} GB/s")
    print("| model | tokens | router only, h | expert outputs too, h | peak, GB |")
    print("|---|---|---|---|---|")
    for name, m in MODELS.items():
        for tokens in map(int, args.tokens.split(",")):
            once, layer_gb, states_gb = plan(m, tokens, 1, gflops, read)
            twice, *_ = plan(m, tokens, 2, gflops, read)
            peak = layer_gb + states_gb + 0.4
            print(f"| {name} | {tokens:,} | {once / 3600:.2f} | {twice / 3600:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
