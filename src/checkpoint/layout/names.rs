//! What a tensor's name says by the layouts of the families (`crate::families`): its layer, and
//! which part of which expert it holds.

use super::factors::Factor;
use crate::families::layouts;
pub(crate) use crate::families::{Experts, Layout};
use crate::model::{LayerId, Role, Stack};

/// What an expert tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Weight(usize, Role),
    Bias(usize, Role),
    /// Of a projection in factors.
    Factor(usize, Role, Factor),
    FusedGateUp,
    FusedGateUpBias,
    FusedDown,
    FusedDownBias,
    /// One projection of every expert.
    Flat(Role),
}

impl Layout {
    /// What the tensor `rest` of a block holds, if it is one of this layout's expert tensors.
    pub(crate) fn part(&self, rest: &str) -> Option<Part> {
        match &self.experts {
            Experts::Each { before, projections } => {
                let (index, rest) = rest.strip_prefix(before)?.split_once('.')?;
                let (projection, kind) = rest.split_once('.')?;
                let (role, _) = projections.iter().find(|(_, name)| *name == projection)?;
                match kind {
                    "weight" => Some(Part::Weight(number(index)?, *role)),
                    "bias" => Some(Part::Bias(number(index)?, *role)),
                    _ => {
                        let suffix = kind.strip_prefix("weight.")?;
                        let factor = Factor::ALL.into_iter().find(|f| f.suffix() == suffix)?;
                        Some(Part::Factor(number(index)?, *role, factor))
                    }
                }
            }
            Experts::Fused { gate_up, .. } if rest == *gate_up => Some(Part::FusedGateUp),
            Experts::Fused { down, .. } if rest == *down => Some(Part::FusedDown),
            Experts::Fused { .. } => None,
            Experts::Flat { before, projections } => {
                let name = rest.strip_prefix(before)?;
                projections.iter().find(|(_, known)| *known == name).map(|(r, _)| Part::Flat(*r))
            }
            Experts::Interleaved { gate_up, down } => {
                let kinds = |name: &str| rest.strip_prefix(name);
                match (kinds(gate_up), kinds(down)) {
                    (Some("" | "_blocks"), _) => Some(Part::FusedGateUp),
                    (Some("_bias"), _) => Some(Part::FusedGateUpBias),
                    (_, Some("" | "_blocks")) => Some(Part::FusedDown),
                    (_, Some("_bias")) => Some(Part::FusedDownBias),
                    _ => None,
                }
            }
        }
    }
}

/// The supported layouts, in words.
pub(crate) fn supported() -> String {
    let words = |layout: &Layout| match &layout.experts {
        Experts::Each { before, projections } => {
            let names: Vec<&str> = projections.iter().map(|(_, name)| *name).collect();
            format!("{} ({before}N.{{{}}})", layout.name, names.join(","))
        }
        Experts::Fused { gate_up, .. } => {
            format!("{} ({gate_up} [N,2f,d] or [N,d,2f])", layout.name)
        }
        Experts::Flat { before, .. } => format!("{} ({before}* [N*f,d])", layout.name),
        Experts::Interleaved { gate_up, .. } => {
            format!("{} ({gate_up} [N,d,2f], interleaved, or MXFP4)", layout.name)
        }
    };
    layouts("").into_iter().map(words).collect::<Vec<_>>().join("; ")
}

/// Splits a tensor's name into its layer, the length of the block's prefix, and the rest.
pub(crate) fn site(name: &str) -> Option<(LayerId, usize, &str)> {
    for (start, stack) in [("encoder.block.", Stack::Encoder), ("decoder.block.", Stack::Decoder)] {
        let Some(rest) = name.strip_prefix(start) else { continue };
        let (index, rest) = rest.split_once('.')?;
        let (_, rest) = rest.strip_prefix("layer.")?.split_once('.')?;
        let id = LayerId { stack, index: number(index)? };
        return Some((id, name.len() - rest.len(), rest));
    }
    BLOCKS.iter().find_map(|word| numbered(name, word))
}

/// What stands before the number of a block.
const BLOCKS: [&str; 2] = ["layers.", "blocks."];

/// The first place where a name has `word` and a number.
fn numbered<'a>(name: &'a str, word: &str) -> Option<(LayerId, usize, &'a str)> {
    let mut after = name;
    while let Some(at) = after.find(word) {
        let before = name.len() - after.len() + at;
        after = &after[at + word.len()..];
        let whole_word = before == 0 || name.as_bytes()[before - 1] == b'.';
        let Some((index, rest)) = after.split_once('.').filter(|_| whole_word) else { continue };
        if let Some(index) = number(index) {
            let stack = match &name[..before] {
                "encoder." | "model.encoder." => Stack::Encoder,
                "decoder." | "model.decoder." => Stack::Decoder,
                _ => Stack::Causal,
            };
            return Some((LayerId { stack, index }, name.len() - rest.len(), rest));
        }
    }
    None
}

/// Whether a tensor that fits no layout nevertheless belongs to routed experts, or is quantised.
pub(crate) fn looks_like_experts(name: &str) -> bool {
    const QUANTISED: [&str; 6] =
        ["_scale_inv", "_blocks", "_scales", ".qweight", ".qzeros", ".weight_packed"];
    let of_experts = name.starts_with("experts.") || name.contains(".experts.");
    let fused = name.contains("block_sparse_moe.input_linear")
        || name.contains("block_sparse_moe.output_linear");
    of_experts || fused || QUANTISED.iter().any(|end| name.ends_with(end))
}

/// A decimal number in its only spelling.
fn number(digits: &str) -> Option<usize> {
    let n: usize = digits.parse().ok()?;
    (n.to_string() == digits).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str) -> Option<(String, &'static str, Part)> {
        let (id, _, rest) = site(name)?;
        // Which block is interleaved its router says.
        let mut others = layouts("").into_iter().filter(|l| !l.is_interleaved());
        others.find_map(|l| Some((id.to_string(), l.name, l.part(rest)?)))
    }

    #[test]
    fn names_of_every_layout_are_recognised_under_any_prefix() {
        let up = Part::Weight(12, Role::Up);
        let cases = [
            ("model.layers.3.mlp.experts.12.up_proj.weight", "layers.3", "qwen", up),
            ("language_model.model.layers.3.mlp.experts.12.up_proj.weight", "layers.3", "qwen", up),
            ("model.layers.0.feed_forward.experts.12.up_proj.weight", "layers.0", "jamba", up),
            ("model.layers.9.block_sparse_moe.experts.12.w3.weight", "layers.9", "mixtral", up),
            ("model.layers.9.feed_forward.experts.12.w3.weight", "layers.9", "lfm2", up),
            (
                "model.language_model.layers.1.mlp.experts.gate_up_proj",
                "layers.1",
                "fused",
                Part::FusedGateUp,
            ),
            (
                "decoder.block.2.layer.2.mlp.experts.expert_12.wi.weight",
                "decoder.layers.2",
                "switch",
                up,
            ),
            (
                "model.encoder.layers.3.ffn.experts.expert_12.fc1.weight",
                "encoder.layers.3",
                "nllb",
                up,
            ),
            (
                "model.decoder.layers.3.ffn.experts.expert_12.fc1.bias",
                "decoder.layers.3",
                "nllb",
                Part::Bias(12, Role::Up),
            ),
            (
                "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
                "layers.1",
                "llama4",
                Part::FusedGateUp,
            ),
            ("transformer.blocks.7.ffn.experts.mlp.w2", "layers.7", "dbrx", Part::Flat(Role::Down)),
        ];
        for (name, id, layout, part) in cases {
            assert_eq!(read(name), Some((id.into(), layout, part)), "{name}");
        }
    }

    #[test]
    fn shared_experts_are_no_experts_and_odd_numbers_are_no_indices() {
        let shared = "model.layers.0.mlp.shared_experts.up_proj.weight";
        assert!(read(shared).is_none() && !looks_like_experts(shared));
        for odd in ["01", "+1", "", "1_000", "99999999999999999999999"] {
            assert!(read(&format!("model.layers.0.mlp.experts.{odd}.up_proj.weight")).is_none());
        }
        assert!(looks_like_experts("model.layers.0.mlp.experts.gate_up_proj_blocks"));
        assert!(looks_like_experts("transformer.blocks.0.ffn.experts.mlp.w3"));
    }
}
