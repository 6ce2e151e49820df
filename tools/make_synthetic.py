#!/usr/bin/env python3
"""make_synthetic.py OUT --layers L --experts N --d-model D --d-ff F: a checkpoint of any size.

Streams pseudo-random finite weights to safetensors shards, one tensor at a time, so a checkpoint
larger than memory is no problem; writes the index, config.json and, beside the folder,
OUT.stats.safetensors. The folder loads in unmodified transformers. The weights mean nothing: this
is for timing, memory and disk.

The statistics hold what the sizes ask for, not what a model would see: inputs are standard normal,
logits, chosen experts and applied weights follow from them by the stored router.
Needs numpy only.
"""

import argparse
import json
import os
import zlib
from pathlib import Path

import numpy as np

# (MoE block, gate, up, down) and the names of the two numbers of the layer in config.json.
FAMILIES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"),
    "qwen3_moe": (
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        "num_experts",
        "moe_intermediate_size",
    ),
}
DTYPES = {"bf16": ("BF16", "<u2"), "f32": ("F32", "<u4")}
NAMES = {"<f4": "F32", "<i4": "I32"}


def config(a):
    """config.json of a model whose MoE layers dominate: tiny vocabulary and attention."""
    _, _, experts, width = FAMILIES[a.family]
    architecture = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[a.family]
    own = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        "architectures": [architecture],
        "model_type": a.family,
        "dtype": {"bf16": "bfloat16", "f32": "float32"}[a.dtype],
        "hidden_act": "silu",
        "hidden_size": a.d_model,
        "intermediate_size": a.d_ff,
        width: a.d_ff,
        experts: a.experts,
        "num_experts_per_tok": a.top_k,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **(own if a.family == "qwen3_moe" else {}),
    }


def tensors(a):
    """(name, shape) of every tensor, in the order in which they are written."""
    block, (gate, up, down), _, _ = FAMILIES[a.family]
    d, f = a.d_model, a.d_ff
    yield "model.embed_tokens.weight", (a.vocab, d)
    for layer in range(a.layers):
        p = f"model.layers.{layer}"
        yield f"{p}.input_layernorm.weight", (d,)
        yield f"{p}.self_attn.q_proj.weight", (a.heads * a.head_dim, d)
        yield f"{p}.self_attn.k_proj.weight", (a.kv_heads * a.head_dim, d)
        yield f"{p}.self_attn.v_proj.weight", (a.kv_heads * a.head_dim, d)
        yield f"{p}.self_attn.o_proj.weight", (d, a.heads * a.head_dim)
        if a.family == "qwen3_moe":
            yield f"{p}.self_attn.q_norm.weight", (a.head_dim,)
            yield f"{p}.self_attn.k_norm.weight", (a.head_dim,)
        yield f"{p}.post_attention_layernorm.weight", (d,)
        yield router_name(a, layer), (a.experts, d)
        for e in range(a.experts):
            yield f"{p}.{block}.experts.{e}.{gate}.weight", (f, d)
            yield f"{p}.{block}.experts.{e}.{up}.weight", (f, d)
            yield f"{p}.{block}.experts.{e}.{down}.weight", (d, f)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (a.vocab, d)


def router_name(a, layer):
    return f"model.layers.{layer}.{FAMILIES[a.family][0]}.gate.weight"


def values(a, name, shape):
    """The tensor's bits: a function of the seed and the name alone.

    Sign and mantissa are random, the exponent is one of four: magnitudes from 2^-11 to 2^-7
    (routers: 2^-7 to 2^-3, so that their logits spread), without a call to a normal generator.
    """
    _, bits = DTYPES[a.dtype]
    count = int(np.prod(shape))
    if name.endswith("norm.weight"):
        one = np.float32(1).view(np.uint32) >> (16 if bits == "<u2" else 0)
        return np.full(count, one, bits)
    seed = np.random.PCG64([a.seed, zlib.crc32(name.encode())])
    size = np.dtype(bits).itemsize
    raw = seed.random_raw(-(-count * size // 8)).view(bits)[:count]
    exponent = 120 if name.endswith("gate.weight") else 116  # Multiples of 4.
    mantissa = 7 if size == 2 else 23
    raw &= np.array((1 << (8 * size - 1)) | (4 << mantissa) - 1, bits)
    raw |= np.array(exponent << mantissa, bits)
    return raw


def as_f32(bits):
    """bf16 or f32 bits to f32."""
    wide = bits.astype(np.uint32) << 16 if bits.dtype.itemsize == 2 else bits
    return wide.view(np.float32)


def write_safetensors(path, plan, fill, metadata):
    """Writes header and tensors; `fill(name)` is called once per (name, dtype, shape, bytes)."""
    header, offset = {"__metadata__": metadata}, 0
    for name, dtype, shape, size in plan:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, _, _, size in plan:
            data = memoryview(np.ascontiguousarray(fill(name))).cast("B")
            assert len(data) == size, name
            file.write(data)


def write_weights(a, out):
    """Shards of at most `shard_bytes` (or one tensor), and the index when there are several."""
    dtype, bits = DTYPES[a.dtype]
    shards, used = [[]], 0
    for name, shape in tensors(a):
        size = int(np.prod(shape)) * np.dtype(bits).itemsize
        if shards[-1] and used + size > a.shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, dtype, shape, size))
        used += size
    files = {}
    for i, plan in enumerate(shards):
        many = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file = many if len(shards) > 1 else "model.safetensors"
        shape_of = {name: shape for name, _, shape, _ in plan}
        fill = lambda name, shape_of=shape_of: values(a, name, shape_of[name])  # noqa: E731
        write_safetensors(out / file, plan, fill, {"format": "pt"})
        files.update(dict.fromkeys(shape_of, file))
    total = sum(size for plan in shards for *_, size in plan)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total, len(shards)


def layer_statistics(a, layer):
    """Inputs, router logits, chosen experts, applied weights and counts of one layer."""
    rng = np.random.default_rng([a.seed, layer])
    inputs = rng.standard_normal((a.tokens, a.d_model), np.float32)
    shape = (a.experts, a.d_model)
    router = as_f32(values(a, router_name(a, layer), shape)).reshape(shape)
    logits = inputs @ router.T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : a.top_k].astype("<i4")
    top = np.take_along_axis(logits, chosen, axis=1)
    weights = np.exp(top - top.max(axis=1, keepdims=True))
    return {
        "router_logits": logits.astype("<f4"),
        "topk_indices": chosen,
        "topk_weights": (weights / weights.sum(axis=1, keepdims=True)).astype("<f4"),
        "counts": np.bincount(chosen.ravel(), minlength=a.experts).astype("<i4"),
        "moe_input": inputs.astype("<f4"),
    }


def write_statistics(a, path):
    made = {}
    for layer in range(a.layers):
        for part, array in layer_statistics(a, layer).items():
            made[f"layers.{layer}.{part}"] = array
    block = FAMILIES[a.family][0]
    layers = [
        {"name": f"layers.{i}", "module": f"model.layers.{i}.{block}", "tokens": a.tokens,
         "top_k": a.top_k}
        for i in range(a.layers)
    ]  # fmt: skip
    metadata = {
        "format": "pt",
        "model_type": a.family,
        "num_experts": str(a.experts),
        "domains": json.dumps(["synthetic"]),
        "layers": json.dumps(layers),
    }
    plan = [(n, NAMES[t.dtype.str], t.shape, t.nbytes) for n, t in made.items()]
    write_safetensors(path, plan, made.__getitem__, metadata)


def write_all(a, out):
    out = Path(out)
    os.makedirs(out, exist_ok=True)
    total, shards = write_weights(a, out)
    (out / "config.json").write_text(json.dumps(config(a), indent=2) + "\n")
    statistics = out.with_name(out.name + ".stats.safetensors")
    write_statistics(a, statistics)
    return {"out": str(out), "statistics": str(statistics), "bytes": total, "shards": shards}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--d-model", type=int, required=True)
    parser.add_argument("--d-ff", type=int, required=True)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--family", choices=FAMILIES, default="mixtral")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the statistics")
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(write_all(args, args.out)))


if __name__ == "__main__":
    main()
