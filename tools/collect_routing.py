#!/usr/bin/env python3
"""collect_routing.py MODEL TEXT OUT.safetensors: statistics of any MoE model of transformers.

    python3 tools/collect_routing.py MODEL TEXT OUT [--tokens N] [--window L] [--samples M]
        [--dtype bfloat16] [--device cuda]

For families whose forward pass this crate does not have. Runs text through the model, hooks every
MoE block, and writes docs/STATISTICS.md's file: counts, logit Gram matrix, router mass, output
norms, REAP saliency, mean outputs, and M evenly spread tokens as samples. Nothing but the samples
grows with the text. TEXT is a .txt file, a folder of them, or a safetensors file with `input_ids`
(W, L) and, for encoder-decoder models, `decoder_input_ids` (W, L'); from text the decoder gets the
second half of each window. A block is a module with `experts` and a `gate` or `router`.

Llama-4 weighs the input of an expert, not its output: `moe_input` is then the weighed input, and
the weights are 1. Needs what tools/stock.py needs.
"""

import argparse
import json
import sys
from pathlib import Path

import stock
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional


def layer_name(module):
    """`model.layers.3.mlp` → `layers.3`, `encoder.block.1.layer.1.mlp` → `encoder.layers.1`."""
    parts = module.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = next((part + "." for part in parts if part in ("encoder", "decoder")), "")
    return f"{stack}layers.{parts[at]}"


def owner(router):
    """The module of the router, itself perhaps, that has the (N, H) weight."""
    for module in router.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            return module
    raise SystemExit(f"no (N, H) weight in {type(router).__name__}")


class Layer:
    """Collects one MoE block."""

    def __init__(self, name, block, router, tokens, samples):
        self.name, self.experts = name, block.experts
        self.tokens, self.most, self.seen, self.busy = tokens, samples, 0, False
        self.linear = owner(router)
        n, width = self.linear.weight.shape
        self.top_k, self.n = 0, n
        wide = {"dtype": torch.float64}
        self.gram = torch.zeros(n, n, **wide)
        self.counts = torch.zeros(n, dtype=torch.int64)
        self.mass, self.norm, self.saliency = (torch.zeros(n, **wide) for _ in range(3))
        self.outputs = torch.zeros(n, width, **wide)
        self.kept = []
        self.linear.register_forward_hook(self.route)
        self.experts.register_forward_pre_hook(self.visit, with_kwargs=True)
        self.scale = getattr(self.experts, "moe_token_dropout", 0.0)

    def route(self, linear, args, _):
        x = args[0].reshape(-1, args[0].shape[-1])
        bias = getattr(linear, "bias", None)
        bias = None if bias is None else bias.float()
        self.logits = functional.linear(x.float(), linear.weight.float(), bias)

    def routing(self, args):
        """(T, H) inputs, (T, K) chosen experts, -1 where dropped, and (T, K) applied weights."""
        x = args[0].reshape(-1, args[0].shape[-1])
        if len(args) == 1:  # Llama-4: every expert's weighed input, zeros for the others.
            x = x.view(self.n, -1, x.shape[-1])
            weight, chosen = self.logits.topk(self.k_of_llama4, -1)
            if chosen.shape[1] > 1:
                raise SystemExit("Llama-4 with more than one expert per token has no one input")
            x = x[chosen[:, 0], torch.arange(len(chosen))]
            return x, chosen, torch.ones_like(weight)
        chosen, weights = args[1], args[2]
        if chosen.dim() == 3:  # Switch: a mask over experts, empty beyond the capacity.
            mask = chosen.reshape(-1, self.n)
            index = self.logits.argmax(-1, keepdim=True)
            return x, index.masked_fill(mask.sum(-1, keepdim=True) == 0, -1), weights.float()
        if isinstance(self.experts, nn.ModuleDict):  # NLLB: gates of all experts, 0 if not chosen.
            gates, index = weights.float().topk(2, -1)
            return x, index.masked_fill(gates == 0, -1), gates * (1 - self.scale)
        return x, chosen.reshape(len(x), -1), weights.reshape(len(x), -1).float()

    def output(self, expert, x):
        """What an expert gives without a weight."""
        if isinstance(self.experts, nn.ModuleDict):
            return self.experts[f"expert_{expert}"](x)
        if hasattr(self, "k_of_llama4"):
            e = self.experts
            gate, up = (x @ e.gate_up_proj[expert]).chunk(2, -1)
            return (up * e.act_fn(gate)) @ e.down_proj[expert]
        index = torch.full((len(x), 1), expert, device=x.device)
        return self.experts(x, index, torch.ones_like(index, dtype=x.dtype)).reshape(x.shape)

    def visit(self, _, args, kwargs):
        if self.busy:
            return
        self.busy = True
        x, chosen, weights = self.routing(args + tuple(kwargs.values()))
        self.top_k = chosen.shape[1]
        logits = self.logits.double().cpu()
        self.gram += logits.T @ logits
        routed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in chosen[chosen >= 0].unique().tolist():
            token, slot = torch.where(chosen == expert)
            out, weight = self.output(expert, x[token]).float(), weights[token, slot]
            routed.index_add_(0, token, out * weight[:, None])
            norm, weight = out.norm(dim=-1).double(), weight.double()
            self.counts[expert] += len(token)
            self.mass[expert] += weight.sum().cpu()
            self.norm[expert] += norm.sum().cpu()
            self.saliency[expert] += (norm * weight).sum().cpu()
            self.outputs[expert] += out.double().sum(0).cpu()
        at = self.seen + torch.arange(len(x))
        taken = (at + 1) * self.most // self.tokens > at * self.most // self.tokens
        taken = (taken.to(chosen.device) & (chosen >= 0).all(-1)).nonzero().squeeze(-1)
        parts = (x, self.logits, chosen.int(), weights, routed)
        self.kept.append([part[taken].cpu() for part in parts])
        self.seen += len(x)
        self.busy = False

    def tensors(self):
        per = self.counts.clamp(min=1).double()
        found = {
            "counts": self.counts.int(),
            "logit_gram": self.gram,
            "router_mass": self.mass,
            "expert_out_norm": (self.norm / per).float(),
            "expert_mean_gate": (self.mass / per).float(),
            "reap_saliency": (self.saliency / per).float(),
            "expert_mean_output": (self.outputs / per[:, None]).float(),
        }
        names = ("moe_input", "router_logits", "topk_indices", "topk_weights", "routed_output")
        parts = [torch.cat(part) for part in zip(*self.kept)]
        samples = len(parts[0])
        if samples:
            found |= {name: part.contiguous() for name, part in zip(names, parts)}
        about = {"name": self.name, "tokens": self.seen, "top_k": self.top_k, "samples": samples}
        return {f"{self.name}.{name}": part for name, part in found.items()}, about


def layers(model, lengths, samples):
    """A collector for every block; `lengths`: tokens of encoder and decoder, or of the one."""
    found = []
    for module, block in model.named_modules():
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if not isinstance(getattr(block, "experts", None), nn.Module) or router is None:
            continue
        name = layer_name(module)
        layer = Layer(name, block, router, lengths[name.startswith("decoder.")], samples)
        if "Llama4" in type(router).__name__:
            layer.k_of_llama4 = router.top_k
        found.append(layer)
    if not found:
        raise SystemExit(f"{type(model).__name__} has no block with experts and a router")
    return found


def windows(path, folder, length, tokens, both):
    """Token ids, (W, L), and those of the decoder."""
    if path.suffix == ".safetensors":
        given = load_file(path)
        return given["input_ids"].long(), given.get("decoder_input_ids")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    rows = []
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        rows.append([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])
    # The files in turn.
    order = [row[i] for i in range(max(map(len, rows), default=0)) for row in rows if i < len(row)]
    ids = torch.tensor(order[: max(tokens // length, 1)])
    if not len(ids):
        raise SystemExit(f"{path} has no {length} tokens")
    return (ids[:, : length // 2], ids[:, length // 2 :]) if both else (ids, None)


@torch.inference_mode()
def collect(model, ids, decoder, samples):
    """Tensors and metadata of the statistics file."""
    lengths = [ids.numel(), 0 if decoder is None else decoder.numel()]
    blocks = layers(model, lengths, samples)
    for i in range(len(ids)):
        given = {"input_ids": ids[i : i + 1].to(model.device), "use_cache": False}
        if decoder is not None:
            given["decoder_input_ids"] = decoder[i : i + 1].long().to(model.device)
        model(**given)
    tensors, about = {}, []
    for block in blocks:
        found, line = block.tensors()
        tensors |= found
        about.append(line)
    meta = {"format": "pt", "model_type": model.config.model_type, "layers": json.dumps(about)}
    if len({block.n for block in blocks}) == 1:
        meta["num_experts"] = str(blocks[0].n)
    return tensors, meta


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = stock.load(args.model, getattr(torch, args.dtype)).to(args.device)
    both = model.config.is_encoder_decoder
    ids, decoder = windows(args.text, args.model, args.window, args.tokens, both)
    tensors, meta = collect(model, ids, decoder, args.samples)
    save_file(tensors, args.out, metadata=meta)
    print(json.dumps({"out": str(args.out), "layers": json.loads(meta["layers"])}))


if __name__ == "__main__":
    sys.exit(main())
