//! Switch Transformers: a T5 encoder and decoder, one expert a token, with a capacity.

use crate::error::Result;
use crate::families::layout::SWITCH;
use crate::families::routing::{Renormalise, Routing};
use crate::families::{Family, Forward, Keys, Runtimes, activation};
use crate::model::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["switch_transformers"],
    layouts: &[&SWITCH],
    routing: Routing { fixed_top_k: Some(1), ..Routing::softmax(Renormalise::Never) },
    forward: Forward::EncoderDecoder(SwitchSpec::read),
    runtimes: Runtimes::NEITHER,
}];

/// A Switch model, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SwitchSpec {
    /// Width of the residual stream.
    pub(crate) d_model: usize,
    /// Width of a head; `heads · d_kv` need not be `d_model`.
    pub(crate) d_kv: usize,
    /// Number of heads.
    pub(crate) heads: usize,
    /// Width of dense MLPs.
    pub(crate) d_ff: usize,
    /// Number of encoder blocks.
    pub(crate) encoder_layers: usize,
    /// Number of decoder blocks.
    pub(crate) decoder_layers: usize,
    /// Number of token ids.
    pub(crate) vocab: usize,
    /// `ε` of the layer norms.
    pub(crate) eps: f32,
    /// The non-linearity of dense MLPs.
    pub(crate) activation: Activation,
    /// Tokens of one sequence that an expert takes; further ones get 0 from the MoE block.
    pub(crate) capacity: usize,
    /// Number of buckets of relative positions, even.
    pub(crate) buckets: usize,
    /// Distance from which all positions share a bucket.
    pub(crate) max_distance: usize,
    /// Whether the embedding is also the output projection, scaled by `d_model^−½`.
    pub(crate) tied: bool,
    /// The token that starts the decoder.
    pub(crate) start: u32,
    /// Token ids that end a generation.
    pub(crate) end: Vec<u32>,
}

impl SwitchSpec {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for a missing, ill-typed or contradictory
    /// key, [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for another activation.
    pub(super) fn read(keys: Keys<'_>) -> Result<Self> {
        let encoder_layers = keys.size("num_layers")?;
        let buckets = keys.optional_size("relative_attention_num_buckets")?.unwrap_or(32);
        let max_distance = keys.optional_size("relative_attention_max_distance")?.unwrap_or(128);
        if !buckets.is_multiple_of(4) || max_distance <= buckets / 2 {
            let expected = format!("a multiple of 4, below twice the distance {max_distance}");
            return Err(keys.wrong("relative_attention_num_buckets", &expected, buckets));
        }
        let start = keys.tokens("decoder_start_token_id")?.first().copied();
        let pad = keys.tokens("pad_token_id")?.first().copied();
        let act = match keys.text("dense_act_fn")? {
            None => Activation::Relu,
            Some(_) => activation(keys, "dense_act_fn")?,
        };
        Ok(Self {
            d_model: keys.size("d_model")?,
            d_kv: keys.size("d_kv")?,
            heads: keys.size("num_heads")?,
            d_ff: keys.size("d_ff")?,
            encoder_layers,
            decoder_layers: keys.optional_size("num_decoder_layers")?.unwrap_or(encoder_layers),
            vocab: keys.size("vocab_size")?,
            eps: keys.number("layer_norm_epsilon")?.unwrap_or(1e-6) as f32,
            activation: act,
            capacity: keys.optional_size("expert_capacity")?.unwrap_or(64),
            buckets,
            max_distance,
            tied: keys.flag("tie_word_embeddings", true)?,
            start: start.or(pad).unwrap_or(0),
            end: keys.tokens("eos_token_id")?,
        })
    }

    /// The decoder's input when it is to produce `targets`: shifted right behind the start token.
    pub(crate) fn shifted(&self, targets: &[u32]) -> Vec<u32> {
        let kept = targets.len().saturating_sub(1);
        std::iter::once(self.start).chain(targets[..kept].iter().copied()).collect()
    }
}
