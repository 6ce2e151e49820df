#!/usr/bin/env python3
"""check_native.py NATIVE... [--tolerance X]: a native folder gives transformers our logits.

Loads each folder as its users do, AutoModelForCausalLM.from_pretrained(trust_remote_code=True),
without missing, unexpected or mismatched tensors, and compares the logits on fixed tokens, in f32,
with those of this crate (`benches/peers/logits.rs`). Prints JSON, a line for each; the status is 1
when a difference is above the tolerance. --dtype auto computes in the stored type instead and only
looks for finite logits. Needs what tools/stock.py needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import stock
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

OURS = ["cargo", "bench", "--quiet", "--bench", "peers", "--", "logits"]


def load(folder, dtype):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    both = getattr(config, "is_encoder_decoder", False)
    auto = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"{folder} does not match {type(model).__name__}: {str(wrong)[:2000]}")
    return model.eval()


def tokens(model, count=96, seed=7):
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(4, vocabulary, (2, count), generator=draw, dtype=torch.int32)
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1).contiguous()
    return given


@torch.inference_mode()
def theirs(model, given):
    given = {name: ids.long() for name, ids in given.items()}
    return model(**given, use_cache=False).logits.float()


def ours(folder, given):
    with tempfile.TemporaryDirectory() as scratch:
        ids, out = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file(given, ids)
        subprocess.run(OURS + [str(folder), str(ids), str(out)], check=True)
        return load_file(out)["logits"]


def check(folder, tolerance, dtype):
    model = load(folder, dtype)
    given = tokens(model)
    found = theirs(model, given)
    report = {
        "folder": str(folder),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "finite": bool(found.isfinite().all()),
    }
    ok = report["finite"]
    if dtype == torch.float32:
        expected = ours(folder, given)
        difference = (found - expected).abs().max().item()
        report["max_abs_difference"] = difference
        report["max_abs_logit"] = expected.abs().max().item()
        ok = ok and difference <= tolerance
    print(json.dumps(report), flush=True)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="NATIVE")
    parser.add_argument("--tolerance", type=float, default=2e-4, metavar="X")
    parser.add_argument("--dtype", choices=("float32", "auto"), default="float32")
    args = parser.parse_args()
    dtype = torch.float32 if args.dtype == "float32" else "auto"
    ok = [check(folder, args.tolerance, dtype) for folder in args.folders]
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main())
