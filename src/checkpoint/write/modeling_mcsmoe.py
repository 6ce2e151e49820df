"""Runs a native MC-SMoE folder in transformers: AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True).

The model is the one that was merged, with its own router of N rows. Behind the router an expert map
leads to M experts; weights of rows that lead to the same expert add up, and rows that lead to none
are closed before the softmax. A projection may be stored in factors, W = L R + S with S zero but
for some rows; it stays in factors, in memory and in its product. Needs transformers 5.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, CONFIG_MAPPING
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

FACTORS = ("left", "right", "rows", "row_index")
# The projections by the names that families give them: gate, up, down.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
NAMES += ((None, "wi", "wo"), (None, "fc1", "fc2"))
# Model types without a class of their own.
SAME = {"kimi_k2": "deepseek_v3"}


class McsmoeConfig(PreTrainedConfig):
    """The merged model's config.json; `base()` is the original's config."""

    model_type = "mcsmoe"

    def base(self):
        keys, _ = PreTrainedConfig.get_config_dict(self._name_or_path)
        native = keys.pop("mcsmoe")
        keys.pop("auto_map", None)
        base = native["base_model_type"]
        keys["model_type"] = SAME.get(base, base)
        keys["architectures"] = native["base_architectures"]
        return CONFIG_MAPPING[keys["model_type"]].from_dict(keys), native["expert_map"]


class Factored(nn.Module):
    """The parameters of W = L R + S, in place of a weight."""

    def __init__(self, shapes):
        super().__init__()
        for name in ("left", "right", "rows"):
            setattr(self, name, nn.Parameter(torch.empty(shapes[name])))
        index = torch.empty(shapes["row_index"], dtype=torch.int32)
        self.row_index = nn.Parameter(index, requires_grad=False)

    def forward(self, x):
        y = functional.linear(functional.linear(x, self.right), self.left)
        return y.index_add(-1, self.row_index, functional.linear(x, self.rows))


class Projection(nn.Module):
    """y = W x + b, W whole or in factors; `shapes` of its tensors as they are on disk."""

    def __init__(self, shapes):
        super().__init__()
        whole = shapes.get("weight")
        if whole is None:
            part = {name: shapes[f"weight.{name}"] for name in FACTORS}
            self.weight = Factored(part)
        else:
            self.weight = nn.Parameter(torch.empty(whole))
        bias = shapes.get("bias")
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias))

    def forward(self, x):
        if isinstance(self.weight, Factored):
            y = self.weight(x)
            return y if self.bias is None else y + self.bias
        return functional.linear(x, self.weight, self.bias)


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, shapes, act):
        super().__init__()
        self.names = next(names for names in NAMES if names[1] in shapes)
        self.act = act
        for name in filter(None, self.names):
            setattr(self, name, Projection(shapes[name]))

    def forward(self, x):
        gate, up, down = (name and getattr(self, name) for name in self.names)
        hidden = up(x)
        return down(self.act(hidden) if gate is None else self.act(gate(x)) * hidden)


class MappedExperts(nn.ModuleDict):
    """The experts of a block that has tensors of their own for each: M of them for N rows."""

    def __init__(self, shapes, labels, act, dropout):
        super().__init__({name: Expert(of, act) for name, of in shapes.items()})
        self.labels = labels
        self.dropout = dropout

    def forward(self, hidden_states, chosen, weights):
        if chosen.dim() == 3:  # Switch tells a row by a mask over rows, empty beyond the capacity.
            rows = weights[:, :1] * chosen[:, 0]
        elif self.dropout is not None:  # NLLB gives the gates of all rows.
            rows = weights * (1 - self.dropout)
            chosen = (weights != 0)[:, None]
        else:
            rows = weights.new_zeros(len(weights), len(self.labels))
            rows.scatter_add_(1, chosen, weights)
            chosen = functional.one_hot(chosen, len(self.labels))
        visits = chosen.amax(1).int()
        out = torch.zeros_like(hidden_states)
        for slot, expert in enumerate(self.values()):
            members = [i for i, label in enumerate(self.labels) if label == slot]
            token = visits[:, members].amax(-1).nonzero().squeeze(-1)
            if len(token):
                weight = rows[token][:, members].sum(-1, keepdim=True)
                out.index_add_(0, token, (expert(hidden_states[token]) * weight).to(out.dtype))
        return out


class Closed(TorchFunctionMode):
    """While a router runs, the logits, and what a correction is added to, of rows that lead to no
    expert are -inf."""

    ADD = (torch.add, torch.Tensor.add, torch.Tensor.__add__)

    def __init__(self, labels):
        super().__init__()
        self.rows = torch.tensor([label is None for label in labels])
        self.begun = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        logits = func is functional.linear
        if logits or (self.begun and func in self.ADD and out.shape[-1] == len(self.rows)):
            self.begun = True
            return out.masked_fill(self.rows.to(out.device), float("-inf"))
        return out


def close(router, labels):
    """Makes a router choose among the rows that lead to an expert."""
    forward = router.forward

    def closed(*args, **kwargs):
        with Closed(labels):
            return forward(*args, **kwargs)

    router.forward = closed


def narrow(experts, labels):
    """Makes experts that share tensors M instead of N, behind the map."""
    slots = 1 + max(label for label in labels if label is not None)
    for owner in experts.modules():
        for name, whole in list(owner.named_parameters(recurse=False)):
            shape = (whole.shape[0] // len(labels) * slots, *whole.shape[1:])
            setattr(owner, name, nn.Parameter(torch.empty(shape, dtype=whole.dtype)))
    experts.num_experts = slots
    # A closed row is never chosen; what it leads to does not matter.
    table = [label or 0 for label in labels]

    def mapped(_, args, kwargs):
        hidden_states, chosen, *rest = args
        return (hidden_states, torch.tensor(table, device=chosen.device)[chosen], *rest), kwargs

    experts.register_forward_pre_hook(mapped, with_kwargs=True)


def layer_name(module):
    """`model.layers.3.mlp` → `layers.3`, `encoder.block.1.layer.1.mlp` → `encoder.layers.1`."""
    parts = module.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = next((part + "." for part in parts if part in ("encoder", "decoder")), "")
    return f"{stack}layers.{parts[at]}"


def tensor_shapes(folder):
    """Shapes of all tensors, and of those of experts by layer, expert, projection and kind."""
    experts = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                before, found, rest = name.rpartition(".experts.")
                parts = rest.split(".", 2)
                if found and len(parts) == 3:
                    expert, projection, kind = parts
                    layer = experts.setdefault(layer_name(before), {})
                    of = layer.setdefault(expert, {}).setdefault(projection, {})
                    of[kind] = file.get_slice(name).get_shape()
    number = lambda expert: int(expert.removeprefix("expert_"))  # noqa: E731
    return {
        layer: {e: of[e] for e in sorted(of, key=number)} for layer, of in experts.items()
    }


def rebuild(model, shapes, maps):
    """Puts the merged experts in place of the original's."""
    done = set()
    for module, block in list(model.named_modules()):
        experts = getattr(block, "experts", None)
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if not isinstance(experts, nn.Module) or router is None:
            continue
        layer = layer_name(module)
        labels = maps[layer]["label"] if layer in maps else None
        if layer in shapes:
            of = next(iter(experts.values())) if isinstance(experts, nn.ModuleDict) else experts
            act = getattr(of, "act_fn", None) or of.act
            identity = list(range(len(shapes[layer])))
            dropout = getattr(experts, "moe_token_dropout", None)
            block.experts = MappedExperts(shapes[layer], labels or identity, act, dropout)
        elif labels is not None:
            narrow(experts, labels)
        if labels is not None and None in labels:
            close(router, labels)
        done.add(layer)
    if missing := maps.keys() - done:
        raise ValueError(f"{type(model).__name__} has no mixture of experts in {sorted(missing)}")


def conversions(model_type, separate):
    """The family's renamings; not the fusing of experts that stay separate."""
    found = get_checkpoint_conversion_mapping(model_type) or []
    fuses = lambda c: any("experts.*." in str(p) for p in c.source_patterns)  # noqa: E731
    return [c for c in found if not (separate and fuses(c))]


class McsmoeForCausalLM(PreTrainedModel):
    """Loads as the merged model's own class, with merged experts."""

    config_class = McsmoeConfig
    auto = AutoModelForCausalLM

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no folder: download the model first")
        config = config or McsmoeConfig.from_pretrained(folder)
        config._name_or_path = str(folder)
        base, maps = config.base()
        if base.model_type.startswith("llama4"):
            raise ValueError("Llama-4 weighs experts' inputs: no map can stand behind its router")
        family = cls.auto._model_mapping[type(base)]
        shapes = tensor_shapes(folder)

        def init(self, config, *args, **kwargs):
            family.__init__(self, config, *args, **kwargs)
            rebuild(self, shapes, maps)

        model_class = type(f"Mcsmoe{family.__name__}", (family,), {"__init__": init})
        # The family's own conversions are found by its model type.
        mapping = conversions(base.model_type, bool(shapes))
        register_checkpoint_conversion_mapping("mcsmoe", mapping, overwrite=True)
        base.model_type = "mcsmoe"
        return model_class.from_pretrained(str(folder), *args, config=base, **kwargs)


class McsmoeForSeq2SeqLM(McsmoeForCausalLM):
    """The same for encoder-decoder models."""

    auto = AutoModelForSeq2SeqLM
