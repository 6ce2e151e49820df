//! Sizes of a model's layers, from headers.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::model::LayerId;

/// One MoE layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    pub(super) experts: u64,
    /// Experts that stay.
    pub(super) kept: u64,
    pub(super) top_k: u64,
    pub(super) d_model: u64,
    pub(super) d_ff: u64,
    /// Parameters and bytes on the disk of all experts.
    pub(super) parameters: u64,
    pub(super) bytes: u64,
}

impl Layer {
    /// Parameters of one expert.
    pub(super) fn expert(&self) -> u64 {
        self.parameters / self.experts.max(1)
    }
}

/// What plans need of a model.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) layers: Vec<Layer>,
    /// Parameters of every block but those of routed experts: attention, norms, router, shared
    /// experts, dense layers.
    pub(super) blocks: Vec<u64>,
    pub(super) d_model: u64,
    /// Columns of all heads of attention together.
    pub(super) attention: u64,
}

impl Shape {
    pub(super) fn of(source: &Checkpoint, counts: &BTreeMap<LayerId, usize>) -> Self {
        let layer = |l: &crate::checkpoint::LayerInfo| Layer {
            experts: l.experts as u64,
            kept: counts.get(&l.id).copied().unwrap_or(l.experts) as u64,
            top_k: l.rule.top_k as u64,
            d_model: l.d_model as u64,
            d_ff: l.d_ff as u64,
            parameters: l.expert_parameters,
            bytes: l.expert_bytes,
        };
        let layers: Vec<Layer> = source.layers().iter().map(layer).collect();
        let mut blocks: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, _, shape) in source.tensors() {
            if let Some(block) = block_of(name) {
                *blocks.entry(block).or_insert(0) += shape.iter().product::<usize>() as u64;
            }
        }
        let routed: u64 = layers.iter().map(|l| l.parameters).sum();
        let all: u64 = blocks.values().sum();
        // Experts are the bulk of sparse blocks; what is left is spread as if blocks were alike.
        let rest = all.saturating_sub(routed) / blocks.len().max(1) as u64;
        let d_model = layers.iter().map(|l| l.d_model).max().unwrap_or(0);
        let known = |key: &str| source.config().integer(key).ok().flatten().map(|n| n as u64);
        let heads = known("num_attention_heads").unwrap_or(d_model.div_ceil(128)).max(1);
        let latent = known("qk_nope_head_dim").zip(known("v_head_dim"));
        let width = latent.map(|(key, value)| key.max(value)).or_else(|| known("head_dim"));
        let attention = heads * width.unwrap_or(d_model / heads);
        Self { layers, blocks: vec![rest; blocks.len()], d_model, attention }
    }
}

/// The part of a tensor's name up to the number of its block.
fn block_of(name: &str) -> Option<&str> {
    let mut at = 0;
    for part in name.split('.') {
        at += part.len();
        if at > part.len() && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return Some(&name[..at]);
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_numbered_parts_of_names() {
        assert_eq!(block_of("model.layers.12.mlp.experts.3.w1"), Some("model.layers.12"));
        assert_eq!(block_of("encoder.block.0.layer.1.mlp.wi"), Some("encoder.block.0"));
        assert_eq!(block_of("model.embed_tokens.weight"), None);
        assert_eq!(block_of("7.weight"), None);
    }
}
