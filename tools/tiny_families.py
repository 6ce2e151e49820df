"""Tiny random checkpoints of every family of transformers that this crate reads, for
tools/sweep_families.py: 8 experts, 2 per token, in twins that differ in nothing but the order of
their hidden units and a little in their router rows."""

import torch
import transformers
from collect_routing import owner
from torch import nn

N, D, F = 8, 32, 24
SIZES = {"hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
SIZES |= {"max_position_embeddings": 256, "initializer_range": 0.15, "num_hidden_layers": 3}
SIZES |= {"num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"intermediate_size": F, "num_local_experts": N}
QWEN = {"intermediate_size": 40, "moe_intermediate_size": F, "num_experts": N}
QWEN |= {"shared_expert_intermediate_size": 20}
ROUTED = {"intermediate_size": 40, "moe_intermediate_size": F, "n_routed_experts": N}
ROUTED |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4}
GROUPS = {"n_group": 2, "topk_group": 1}
LINEAR = {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
SWITCH = {"d_model": D, "d_kv": 8, "d_ff": F, "num_heads": 4, "num_layers": 2, "vocab_size": 99}
SWITCH |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
SWITCH |= {"num_experts": N, "decoder_start_token_id": 0}
NLLB = {"d_model": D, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99, "num_experts": N}
NLLB |= {"encoder_ffn_dim": F, "decoder_ffn_dim": F, "encoder_attention_heads": 4}
NLLB |= {"decoder_attention_heads": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
NLLB |= {"init_std": 0.15, "max_position_embeddings": 256}
DBRX = {"d_model": D, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 99}
DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
DBRX |= {"initializer_range": 0.15, "ffn_config": {"hidden_size": D, "ffn_hidden_size": F}}
DBRX["ffn_config"] |= {"moe_num_experts": N, "moe_top_k": 2}
ERNIE = {"intermediate_size": 40, "moe_intermediate_size": F, "moe_num_experts": N, "moe_k": 2}
ERNIE |= {"moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2}
HYBRID = {"layer_types": ["mamba", "full_attention", "mamba"], "mamba_n_heads": 8}
HYBRID |= {"mamba_d_state": 8, "mamba_d_head": 8}
CONV = ["full_attention", "conv", "full_attention"]

# Model types that transformers knows by another name only.
SAME = {"kimi_k2": "deepseek_v3"}
# Rows of a family whose experts are saved as transformers holds them, fused.
FUSED = {"qwen3_moe-fused": "qwen3_moe"}
# Model type: the keys of its config.
FAMILIES = {
    "mixtral": SIZES | WIDE,
    "qwen2_moe": SIZES | QWEN,
    "qwen3_moe": SIZES | QWEN | {"head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": SIZES | QWEN | LINEAR,
    "qwen3_5_moe_text": SIZES | QWEN | LINEAR,
    "olmoe": SIZES | {"intermediate_size": F, "num_experts": N},
    "flex_olmo": SIZES | {"intermediate_size": F, "num_experts": N},
    "deepseek_v2": SIZES | ROUTED | LATENT | GROUPS | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": SIZES | ROUTED | LATENT | GROUPS,
    "glm4_moe": SIZES | ROUTED | {"head_dim": 8},
    "glm4_moe_lite": SIZES | ROUTED | LATENT,
    "dots1": SIZES | ROUTED | {"head_dim": 8},
    "ernie4_5_moe": SIZES | ERNIE,
    "hunyuan_v1_moe": SIZES | {"intermediate_size": F, "num_experts": N, "head_dim": 8},
    "minimax_m2": SIZES | WIDE | {"head_dim": 8},
    "minimax": SIZES | WIDE | {"head_dim": 8, "block_size": 16},
    "phimoe": SIZES | WIDE,
    "granitemoe": SIZES | WIDE,
    "granitemoeshared": SIZES | WIDE | {"shared_intermediate_size": 20},
    "granitemoehybrid": SIZES | WIDE | {"shared_intermediate_size": 20} | HYBRID,
    "gpt_oss": SIZES | WIDE | {"head_dim": 8, "sliding_window": 32},
    "llama4_text": SIZES | WIDE | {"head_dim": 8, "intermediate_size_mlp": 40},
    "dbrx": DBRX,
    "jamba": SIZES | {"intermediate_size": F, "num_experts": N} | MAMBA,
    "lfm2_moe": SIZES | QWEN | {"num_dense_layers": 1, "layer_types": CONV},
    "afmoe": SIZES | QWEN | {"head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1},
    "switch_transformers": SWITCH,
    "nllb-moe": NLLB,
}
FAMILIES["hunyuan_v1_moe"]["moe_topk"] = FAMILIES["hunyuan_v1_moe"].pop("num_experts_per_tok")
FAMILIES |= {row: FAMILIES[family] for row, family in (SAME | FUSED).items()}
FAMILIES["llama4_text"]["num_experts_per_tok"] = 1
FAMILIES["lfm2_moe"].pop("shared_expert_intermediate_size")
FAMILIES["jamba"] |= {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}


def build(model_type, seed=11, twin=True, **keys):
    """A random model in f32, with these keys besides the family's."""
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[(SAME | FUSED).get(model_type, model_type)]
    config = config(**FAMILIES[model_type] | keys)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            small = tensor.shape[-1:] == (N,) and tensor.is_floating_point()
            if small or name.endswith("proj_bias"):  # Biases of choice and experts start at zero.
                tensor.normal_(0, 0.05)
        if twin:
            for _, block, router in blocks(model):
                twins(block, router)
    return model


def blocks(model):
    """(name, block, router) of every MoE block."""
    for name, block in model.named_modules():
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if isinstance(getattr(block, "experts", None), nn.Module) and router is not None:
            yield name, block, router


def repair(model):
    """transformers 5.24 runs the first two experts of NLLB-MoE only: all of them, as trained."""
    for _, block, _ in blocks(model):
        if type(block.experts).__name__ == "NllbMoeExperts":
            block.experts.forward = lambda x, _, gates, of=block.experts: combine(of, x, gates)
    return model


def combine(experts, x, gates):
    outputs = torch.stack([experts[f"expert_{i}"](x) for i in range(experts.num_experts)], 1)
    return (outputs * gates[:, :, None]).sum(1) * (1 - experts.moe_token_dropout)


def twins(block, router):
    """Makes expert 2i + 1 expert 2i with its hidden units in another order."""
    for first in range(0, N, 2):
        order = torch.randperm(F)
        permute(block.experts, first, first + 1, order)
        weight = owner(router).weight
        if not weight[first].any():  # AFMoE's routers start at zero.
            weight[first].normal_(0, 0.15)
        weight[first + 1] = weight[first] + 0.05 * weight[first].std() * torch.randn(D)


def permute(experts, source, target, order):
    """Makes an expert another one with hidden units in this order."""
    if isinstance(experts, nn.ModuleDict):
        a, b = experts[f"expert_{source}"], experts[f"expert_{target}"]
        up, down = ("wi", "wo") if hasattr(a, "wi") else ("fc1", "fc2")
        getattr(b, up).weight.copy_(getattr(a, up).weight[order])
        getattr(b, down).weight.copy_(getattr(a, down).weight[:, order])
        if getattr(a, up).bias is not None:
            getattr(b, up).bias.copy_(getattr(a, up).bias[order])
            getattr(b, down).bias.copy_(getattr(a, down).bias)
        return
    if hasattr(experts, "mlp"):  # DBRX
        for matrix in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2):
            matrix.view(N, F, D)[target] = matrix.view(N, F, D)[source][order]
        return
    gate_up, down = experts.gate_up_proj, experts.down_proj
    rows = torch.cat([order, order + F])
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: gate and up take turns.
        rows = torch.stack([2 * order, 2 * order + 1], 1).flatten()
        experts.gate_up_proj_bias[target] = experts.gate_up_proj_bias[source][rows]
        experts.down_proj_bias[target] = experts.down_proj_bias[source]
    if gate_up.shape[1:] == (D, 2 * F):  # gpt-oss and Llama-4: transposed.
        gate_up[target] = gate_up[source][:, rows]
        down[target] = down[source][order]
    else:
        gate_up[target] = gate_up[source][rows]
        down[target] = down[source][:, order]
