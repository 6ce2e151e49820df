"""Loads a model folder with unmodified transformers, strictly, and runs fixed tokens through it.

Shared by the developer's tools in this folder; nothing in the crate or its tests depends on it.
Needs `pip install torch transformers safetensors`.
"""

import json
import os
import struct
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(folder, dtype=torch.float32):
    """The model in eval mode. Exits when a tensor is missing, unexpected or of another shape."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Mismatches are let through here only to be named below.
    model, info = auto.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"{folder} does not match {type(model).__name__}: {str(wrong)[:2000]}")
    check_index(Path(folder))
    return model.eval()


def check_index(folder):
    """A shard index and the shards' headers must name the same tensors and the same size."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = json.loads(path.read_text())
    found, size = {}, 0
    for shard in sorted(set(index["weight_map"].values())):
        with open(folder / shard, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if name in found:
                raise SystemExit(f"{folder}: {name} is in {found[name]} and in {shard}")
            found[name] = shard
            size += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    if found != index["weight_map"]:
        names = sorted(set(found.items()) ^ set(index["weight_map"].items()))
        raise SystemExit(f"{folder}: the index disagrees with the shards about {names[:8]}")
    told = index.get("metadata", {}).get("total_size", size)
    if told != size:
        raise SystemExit(f"{folder}: the index says {told} bytes, the shards hold {size}")


def moe_blocks(model):
    """(name, number of experts, router rows) of every MoE block."""
    for name, block in model.named_modules():
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if not hasattr(block, "experts") or router is None:
            continue
        fused = getattr(block.experts, "gate_up_proj", None)
        experts = len(block.experts) if fused is None else fused.shape[0]
        rows = (getattr(router, "classifier", None) or router).weight.shape[0]
        yield name, experts, rows


@torch.inference_mode()
def logits(model, tokens=96, seed=7):
    """(batch, position, vocabulary) f32 logits on fixed pseudo-random tokens."""
    draw = torch.Generator().manual_seed(seed)
    # Leaves out the first ids, which are special tokens in most vocabularies.
    ids = torch.randint(4, model.config.vocab_size, (2, tokens), generator=draw)
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids.flip(1), use_cache=False).logits.float()
    return model(input_ids=ids, use_cache=False).logits.float()
