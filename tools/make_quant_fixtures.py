#!/usr/bin/env python3
"""make_quant_fixtures.py: quantised tensors and what torch and transformers make of them.

Writes tests/fixtures/quant/model.safetensors: `ragged` is FP8 in 128 x 128 blocks that do not
divide it, with the SHA-256 of its f32 values; `codes` holds every finite FP8 code under bf16
scales; `powers` has E8M0 scales; `layers.0.mlp.experts.down_proj` is MXFP4, its values those of
transformers' own conversion, transposed. Needs torch, safetensors and transformers.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "quant" / "model.safetensors"
BLOCK = 128


def dequantised(weight, scale):
    """f32 values of an FP8 matrix; the last block of a side may be short."""
    rows, cols = weight.shape
    wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return weight.float() * wide


def main():
    torch.manual_seed(7)
    fp8 = torch.float8_e4m3fn
    tensors = {}

    def add(name, weight, scale):
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.weight_scale_inv"] = scale
        return dequantised(weight, scale)

    ragged = add("ragged", (torch.randn(130, 300) * 60).to(fp8), torch.rand(2, 3) * 1e-3)
    digest = hashlib.sha256(ragged.numpy().astype("<f4").tobytes()).digest()
    tensors["ragged.sha256"] = torch.tensor(list(digest), dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    codes = codes.reshape(1, 256).view(fp8)
    tensors["codes.values"] = add("codes", codes, torch.tensor([[0.7, -3.1]]).bfloat16())
    powers = torch.tensor([[0, 254], [127, 120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    weight = (torch.randn(129, 130) / 4).to(fp8)[:, 110:].contiguous()
    assert weight.shape == (129, 20)
    tensors["powers.values"] = add("powers", weight, powers[:, 1:].contiguous())

    name = "layers.0.mlp.experts.down_proj"
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 5, 2), dtype=torch.uint8)
    scales[0, 0] = torch.tensor([0, 251], dtype=torch.uint8)
    tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    tensors["down_proj.values"] = convert_moe_packed_tensors(blocks, scales)

    for key, tensor in tensors.items():
        if key.endswith(".values"):
            assert tensor.isfinite().all(), key
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
