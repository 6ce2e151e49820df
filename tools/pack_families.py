"""Quantised tiny checkpoints, with the same values in bf16, for tools/sweep_families.py: gpt-oss in
MXFP4 and DeepSeek-V3 in FP8 with ragged blocks. Both formats' values are exact in bf16 here, FP8's
because its scales are powers of two."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 16


def mxfp4(model, plain, packed):
    """Writes a gpt-oss model with random experts, as bf16 and in MXFP4."""
    draw = torch.Generator().manual_seed(2)
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    codes = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inputs, outputs = tensors[name].shape
        shape = (n, outputs, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        scales = torch.randint(121, 125, shape[:3], generator=draw, dtype=torch.uint8)
        # The low nibble comes first.
        nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        values = LEVELS[(nibbles & 7).long()] * torch.where(nibbles >= 8, -1.0, 1.0)
        values *= 2.0 ** (scales.float() - 127)[..., None]
        tensors[name] = values.flatten(2).transpose(1, 2).contiguous().to(torch.bfloat16)
        codes[name] = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    write(model, tensors, codes, plain, packed, {"quant_method": "mxfp4"})


def fp8(model, plain, packed):
    """Writes a DeepSeek model, as bf16 and with every projection in FP8."""
    model.to(torch.bfloat16).save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    codes = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        whole = tensors[name].float()
        rows, cols = (-(-side // BLOCK) for side in whole.shape)
        exponents = torch.arange(rows * cols).reshape(rows, cols) % 3 - 10
        scales = 2.0 ** exponents.float()
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        wide = wide[: whole.shape[0], : whole.shape[1]]
        code = (whole / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name] = (code.float() * wide).to(torch.bfloat16)
        codes[name] = {name: code, f"{name}_scale_inv": scales}
    about = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    write(model, tensors, codes, plain, packed, about)


def write(model, tensors, codes, plain, packed, about):
    model.to(torch.bfloat16).save_pretrained(plain)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if name not in codes}
    for code in codes.values():
        kept |= code
    save_file(kept, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = about
    (packed / "config.json").write_text(json.dumps(config, indent=2))
    if (plain / "generation_config.json").exists():
        shutil.copy(plain / "generation_config.json", packed)


def equal(a, b):
    """Two folders hold the same tensors, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:8]
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


# Name: family, writer, keys of its config.
PACKED = {
    "gpt_oss-mxfp4": ("gpt_oss", mxfp4, {"intermediate_size": 64}),
    "deepseek_v3-fp8": ("deepseek_v3", fp8, {}),
}
