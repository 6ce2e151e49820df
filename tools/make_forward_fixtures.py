#!/usr/bin/env python
"""Tiny random checkpoints with golden logits, for tests/forward.rs.

    python tools/make_forward_fixtures.py [OUT_DIR] [--of MODEL_DIR]

Writes OUT_DIR/<name>/{config.json, model.safetensors, golden.safetensors}; by default into
tests/fixtures/forward. With --of, writes only golden.safetensors into OUT_DIR for an existing
checkpoint. Weights are rounded to bf16 (and stored so); logits are computed in f32 from the rounded
weights. Needs torch, transformers 5 and safetensors.

With --of, `exact` holds the logits of a pass in f64.

golden.safetensors: `tokens` (w, n) i32 windows and `logits` (w, n, vocab) f32; `prompt` (p) and
`continuation` (g) i32, greedy; Switch: `encoder` (w, n), `decoder` (w, m), `logits` (w, m, vocab).
"""
import argparse
import json
import os
import shutil
import tempfile

import torch
import transformers as tf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

torch.set_num_threads(1)
BASE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.25,
            bos_token_id=None, eos_token_id=None, pad_token_id=None)
MLA = BASE | dict(num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4,
                  v_head_dim=10, moe_intermediate_size=12, intermediate_size=40,
                  n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
                  first_k_dense_replace=1)
QWEN = BASE | dict(moe_intermediate_size=12, intermediate_size=40, num_experts_per_tok=3)


def rope(kind, theta=1e4, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


SMALL = BASE | dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_experts_per_tok=2,
                    head_dim=8, initializer_range=0.35)
SHARED = SMALL | dict(moe_intermediate_size=8, n_routed_experts=4, n_shared_experts=1,
                      first_k_dense_replace=1, routed_scaling_factor=1.5)
HYBRID = SMALL | dict(moe_intermediate_size=8, num_experts=4, shared_expert_intermediate_size=12,
                      linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
                      linear_value_head_dim=5, max_position_embeddings=256,
                      layer_types=["linear_attention", "full_attention"])
INDEXED = SHARED | dict(num_key_value_heads=4, kv_lora_rank=6, q_lora_rank=7, qk_nope_head_dim=6,
                        qk_rope_head_dim=4, v_head_dim=5, index_topk=32, index_head_dim=8,
                        index_n_heads=2)
SHARED_AFTER = SMALL | dict(moe_intermediate_size=8)
YARN = dict(factor=4.0, mscale=1.0, mscale_all_dim=0.8, beta_fast=8, beta_slow=1,
            original_max_position_embeddings=16)
MODELS = {
    "mixtral": tf.MixtralConfig(**BASE, intermediate_size=20, num_local_experts=4,
                                num_experts_per_tok=2),
    "mixtral-sliding": tf.MixtralConfig(**BASE, intermediate_size=20, num_local_experts=4,
                                        num_experts_per_tok=2, sliding_window=5,
                                        tie_word_embeddings=True),
    "qwen2-moe": tf.Qwen2MoeConfig(**QWEN, num_experts=6, shared_expert_intermediate_size=18,
                                   decoder_sparse_step=2),
    "qwen2-moe-sliding": tf.Qwen2MoeConfig(**QWEN, num_experts=6, max_window_layers=1,
                                           shared_expert_intermediate_size=18, norm_topk_prob=True,
                                           use_sliding_window=True, sliding_window=4),
    "qwen3-moe-bias-linear": tf.Qwen3MoeConfig(**QWEN, num_local_experts=6, attention_bias=True,
                                               head_dim=10, norm_topk_prob=True,
                                               **rope("linear", factor=2.5)),
    "qwen3-moe-dynamic": tf.Qwen3MoeConfig(**(QWEN | dict(max_position_embeddings=16)),
                                           num_local_experts=6, head_dim=8,
                                           **rope("dynamic", factor=3.0)),
    "qwen3-moe-llama3": tf.Qwen3MoeConfig(**QWEN, num_local_experts=4, head_dim=8,
                                          **rope("llama3", factor=8.0, low_freq_factor=1.0,
                                                 high_freq_factor=4.0,
                                                 original_max_position_embeddings=32)),
    "olmoe": tf.OlmoeConfig(**BASE, intermediate_size=12, num_experts=6, num_experts_per_tok=3,
                            clip_qkv=0.9),
    "olmoe-bias": tf.OlmoeConfig(**BASE, intermediate_size=12, num_experts=6,
                                 num_experts_per_tok=3, norm_topk_prob=True, attention_bias=True),
    "deepseek-v2": tf.DeepseekV2Config(**MLA, q_lora_rank=14, topk_method="group_limited_greedy",
                                       n_group=4, topk_group=2, routed_scaling_factor=1.7),
    "deepseek-v2-lite": tf.DeepseekV2Config(**MLA, q_lora_rank=None, attention_bias=True,
                                            topk_method="greedy", mlp_bias=False,
                                            **rope("yarn", **YARN)),
    "deepseek-v3": tf.DeepseekV3Config(**MLA, q_lora_rank=14, n_group=4, topk_group=2,
                                       routed_scaling_factor=2.5, **rope("yarn", **YARN)),
    "deepseek-v3-halves": tf.DeepseekV3Config(**MLA, q_lora_rank=None, n_group=1, topk_group=1,
                                              rope_interleave=False, norm_topk_prob=False),
    "switch": tf.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=6, d_ff=24, num_layers=4, num_decoder_layers=2,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_heads=4, num_experts=4,
        expert_capacity=4, dropout_rate=0.0, initializer_factor=1.0, pad_token_id=0,
        decoder_start_token_id=0),
    "switch-untied": tf.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_heads=4, num_experts=4,
        expert_capacity=64, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
        router_bias=True, tie_word_embeddings=False),
    "glm4-moe": tf.Glm4MoeConfig(**SHARED, use_qk_norm=True, attention_bias=True),
    "glm4-moe-lite": tf.Glm4MoeLiteConfig(**(SHARED | dict(
        num_key_value_heads=4, kv_lora_rank=6, q_lora_rank=7, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, n_group=2, topk_group=1))),
    "dots1": tf.Dots1Config(**SHARED, attention_bias=True, sliding_window=5, norm_topk_prob=True,
                            layer_types=["full_attention", "sliding_attention"]),
    "ernie-4.5-moe": tf.Ernie4_5_MoeConfig(**(SMALL | dict(
        moe_intermediate_size=8, moe_num_experts=4, moe_k=2, moe_num_shared_experts=2,
        moe_layer_start_index=1, moe_layer_end_index=1))),
    "minimax-m2": tf.MiniMaxM2Config(**(SMALL | dict(
        intermediate_size=8, num_local_experts=4, rotary_dim=4))),
    "qwen3-next": tf.Qwen3NextConfig(**HYBRID, norm_topk_prob=True, attention_bias=True),
    "qwen3.5-moe": tf.Qwen3_5MoeTextConfig(**HYBRID),
    "gpt-oss": tf.GptOssConfig(**(SMALL | dict(
        intermediate_size=8, num_local_experts=4, sliding_window=6)),
        **rope("yarn", theta=1.5e5, factor=8.0, beta_fast=8.0, beta_slow=1.0, truncate=False,
               original_max_position_embeddings=16)),
    "deepseek-v3.2": tf.DeepseekV32Config(**INDEXED, n_group=2, topk_group=1),
    "glm-5": tf.GlmMoeDsaConfig(**INDEXED),
    "exaone-moe": tf.ExaoneMoeConfig(**(SHARED_AFTER | dict(
        num_experts=4, num_shared_experts=1, sliding_window=6, routed_scaling_factor=1.5,
        layer_types=["sliding_attention", "full_attention"], first_k_dense_replace=0))),
}
ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe_text")
# Tokens of a window, where 20 are too few: a chunk of the gated delta rule has 64.
LENGTHS = {"qwen3-next": 150, "qwen3.5-moe": 150}


def build(config):
    switch = config.model_type == "switch_transformers"
    auto = AutoModelForSeq2SeqLM if switch else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            if name.endswith("bias") or "correction" in name:
                value.normal_(0, 0.2)
            elif "norm" in name:
                # Qwen3-Next stores its norms, but for the gated one, as differences from one.
                centred = config.model_type in ZERO_CENTRED and "linear_attn" not in name
                value.uniform_(-0.5, 0.5) if centred else value.uniform_(0.5, 1.5)
            elif switch and value.dim() == 2 and "relative" not in name:
                value.normal_(0, 1.0 if "shared" in name or "classifier" in name else 0.2)
            value.copy_(value.bfloat16().float())
    return model


def golden(model, length, seed):
    config, draw = model.config, torch.Generator().manual_seed(seed)
    ids = lambda *shape: torch.randint(3, config.vocab_size, shape, generator=draw)
    with torch.inference_mode():
        if config.model_type == "switch_transformers":
            encoder, decoder = ids(2, length), ids(2, length // 2 + 1)
            decoder[:, 0] = 0
            one = lambda i: model(input_ids=encoder[i:i + 1], decoder_input_ids=decoder[i:i + 1])
            logits = torch.cat([one(i).logits for i in range(2)])
            return dict(encoder=encoder.int(), decoder=decoder.int(), logits=logits.float())
        tokens = ids(2, length)
        logits = model(tokens, use_cache=False).logits
        out = dict(tokens=tokens.int(), logits=logits.float())
        prompt = ids(1, 9)
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=12, pad_token_id=0)[0, 9:]
        return out | dict(prompt=prompt[0].int(), continuation=new.int())


def write(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    here = os.path.dirname(os.path.abspath(__file__))
    default = os.path.join(here, "..", "tests", "fixtures", "forward")
    parser.add_argument("out", nargs="?", default=default)
    parser.add_argument("--of")
    parser.add_argument("--only", nargs="*", help="names of MODELS")
    parser.add_argument("--length", type=int, default=200)
    args = parser.parse_args()
    if args.of:
        config = tf.AutoConfig.from_pretrained(args.of)
        switch = config.model_type == "switch_transformers"
        auto = AutoModelForSeq2SeqLM if switch else AutoModelForCausalLM
        model = auto.from_pretrained(args.of, dtype=torch.float32).eval()
        os.makedirs(args.out, exist_ok=True)
        single = golden(model, args.length, 1)
        # What f32 itself costs: the same pass in f64.
        for module in model.double().modules():
            if switch and hasattr(module, "expert_capacity"):
                module.dtype = torch.float64
        single["exact"] = golden(model, args.length, 1)["logits"]
        print(args.of, "f32 off by", (single["exact"] - single["logits"]).abs().max().item())
        write(os.path.join(args.out, "golden.safetensors"), single)
        return
    for number, (name, config) in enumerate(MODELS.items()):
        if args.only and name not in args.only:
            continue
        torch.manual_seed(number)
        model = build(config)
        out = os.path.join(args.out, name)
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            model.bfloat16().save_pretrained(temporary)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(os.path.join(temporary, file), os.path.join(out, file))
            auto = AutoModelForSeq2SeqLM if "switch" in name else AutoModelForCausalLM
            again = auto.from_pretrained(temporary, dtype=torch.float32).eval()
        length = 40 if "switch" in name or config.hidden_size > 16 else LENGTHS.get(name, 20)
        # 40 tokens are beyond every sliding window, and beyond the trained length of `dynamic`.
        write(os.path.join(out, "golden.safetensors"), golden(again, length, number))
        size = sum(os.path.getsize(os.path.join(out, f)) for f in os.listdir(out))
        print(json.dumps({"name": name, "bytes": size}))


if __name__ == "__main__":
    main()
