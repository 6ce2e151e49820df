//! Tiny checkpoints of the rarer layouts: transposed, flat, and with odd configs.

use safetensors::Dtype;

use super::{D, F, K2, N, QWEN, Tiny, W, config, per_expert};

/// A Llama-4 wrapper: fused experts, both tensors transposed, gate columns first.
pub fn llama4() -> Tiny {
    let keys = format!(
        "  \"text_config\": {{\"model_type\": \"llama4_text\", \"num_local_experts\": {N}, \
         \"num_experts_per_tok\": 2}},\n"
    );
    let mut tiny = Tiny::new(config("llama4", &keys));
    for layer in 0..2 {
        let block = format!("language_model.model.layers.{layer}.feed_forward");
        tiny.add(format!("{block}.experts.gate_up_proj"), Dtype::BF16, &[N, D, 2 * F]);
        tiny.add(format!("{block}.experts.down_proj"), Dtype::BF16, &[N, F, D]);
        tiny.add(format!("{block}.router.weight"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.shared_expert.up_proj.weight"), Dtype::BF16, &[F, D]);
    }
    tiny.add("vision_model.layers.7.mlp.fc1.weight", Dtype::BF16, &[3, 2]);
    tiny
}

/// Qwen3-VL-MoE, whose hub folders transpose what Qwen3.5's do not.
pub fn qwen3_vl() -> Tiny {
    let keys = format!(
        "  \"text_config\": {{\"model_type\": \"qwen3_vl_moe_text\", \"num_experts\": {N}, \
         \"num_experts_per_tok\": 2}},\n"
    );
    let mut tiny = Tiny::new(config("qwen3_vl_moe", &keys));
    for layer in 0..2 {
        let block = format!("model.language_model.layers.{layer}.mlp");
        tiny.add(format!("{block}.experts.gate_up_proj"), Dtype::F16, &[N, D, 2 * F]);
        tiny.add(format!("{block}.experts.down_proj"), Dtype::F16, &[N, F, D]);
        tiny.add(format!("{block}.gate.weight"), Dtype::F16, &[N, D]);
    }
    tiny
}

/// DBRX: all experts of a projection in one matrix, down transposed, keys in an object.
pub fn dbrx() -> Tiny {
    let keys = format!(
        "  \"ffn_config\": {{\"ffn_act_fn\": {{\"name\": \"silu\"}}, \
         \"moe_num_experts\": {N}, \"moe_top_k\": 2}},\n"
    );
    let mut tiny = Tiny::new(config("dbrx", &keys));
    for layer in 0..2 {
        let block = format!("transformer.blocks.{layer}.ffn");
        for name in ["w1", "v1", "w2"] {
            tiny.add(format!("{block}.experts.mlp.{name}"), Dtype::BF16, &[N * F, D]);
        }
        tiny.add(format!("{block}.router.layer.weight"), Dtype::BF16, &[N, D]);
    }
    tiny
}

/// NLLB-MoE: encoder and decoder, two matrices with biases.
pub fn nllb() -> Tiny {
    let mut tiny = Tiny::new(config("nllb-moe", &format!("  \"num_experts\": {N},\n")));
    for stack in ["encoder", "decoder"] {
        let block = format!("model.{stack}.layers.3.ffn");
        tiny.add(format!("{block}.router.classifier.weight"), Dtype::F32, &[N, D]);
        for i in 0..N {
            let expert = format!("{block}.experts.expert_{i}");
            tiny.add(format!("{expert}.fc1.weight"), Dtype::F32, &[F, D]);
            tiny.add(format!("{expert}.fc1.bias"), Dtype::F32, &[F]);
            tiny.add(format!("{expert}.fc2.weight"), Dtype::F32, &[D, F]);
            tiny.add(format!("{expert}.fc2.bias"), Dtype::F32, &[D]);
        }
    }
    tiny
}

/// HunYuan: its router's name, and a list with a number for every layer.
pub fn hunyuan() -> Tiny {
    let keys = format!("  \"num_experts\": {N},\n  \"moe_topk\": [2, 2],\n");
    let mut tiny = Tiny::new(config("hunyuan_v1_moe", &keys));
    per_expert(&mut tiny, 2, "mlp.", QWEN, Dtype::BF16);
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.mlp");
        tiny.add(format!("{block}.gate.wg.weight"), Dtype::F32, &[N, D]);
        tiny.add(format!("{block}.shared_mlp.up_proj.weight"), Dtype::BF16, &[F, D]);
    }
    tiny
}

/// MiniMax-M2: Mixtral's names with a correction bias beside the experts.
pub fn minimax_m2() -> Tiny {
    let keys = format!("  \"num_local_experts\": {N},\n{K2}");
    let mut tiny = Tiny::new(config("minimax_m2", &keys));
    per_expert(&mut tiny, 2, "block_sparse_moe.", W, Dtype::BF16);
    for layer in 0..2 {
        let block = format!("model.layers.{layer}.block_sparse_moe");
        tiny.add(format!("{block}.gate.weight"), Dtype::BF16, &[N, D]);
        tiny.add(format!("{block}.e_score_correction_bias"), Dtype::F32, &[N]);
    }
    tiny
}

/// One of every layout here, with its name.
pub fn all() -> Vec<(&'static str, Tiny)> {
    vec![
        ("llama4", llama4()),
        ("fused", qwen3_vl()),
        ("dbrx", dbrx()),
        ("nllb", nllb()),
        ("qwen", hunyuan()),
        ("mixtral", minimax_m2()),
    ]
}
