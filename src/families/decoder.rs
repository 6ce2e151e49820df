//! What a decoder-only model computes, without its weights.

use super::activation::activation;
use super::keys::Keys;
use super::rope::{Rope, RopeDefaults};
use crate::error::Result;
use crate::model::Activation;

/// The norms over the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormSpec {
    pub(crate) kind: NormKind,
    /// `ε` under the root.
    pub(crate) eps: f32,
}

/// A kind of norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// `w ⊙ x / sqrt(mean(x²) + ε)`.
    Rms,
    /// The same with `1 + w`: weights are stored as differences from one.
    ZeroCentredRms,
}

/// Where norms are applied to queries and keys, before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// Nowhere.
    None,
    /// On each head.
    PerHead,
    /// On the whole projection.
    Whole,
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GroupedSpec {
    /// Number of query heads.
    pub(crate) heads: usize,
    /// Number of key and value heads.
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Norms on queries and keys.
    pub(crate) qk_norm: QkNorm,
    /// Biases on q, k, v.
    pub(crate) qkv_bias: bool,
    /// Bias on the output projection.
    pub(crate) out_bias: bool,
    /// Clamps q, k, v to `±clip`.
    pub(crate) clip: Option<f32>,
    /// How many tokens a query sees, itself included.
    pub(crate) window: Option<usize>,
    /// Position embedding; `None` for layers without one.
    pub(crate) rope: Option<Rope>,
    /// Whether each head's output is multiplied by `sigmoid` of a gate, whose projection lies in
    /// `q_proj`: of each head its query, then its gate.
    pub(crate) gated: bool,
    /// Whether each head has a sink: a logit in the softmax that stands for no token.
    pub(crate) sinks: bool,
}

impl GroupedSpec {
    /// Heads and position embedding; no norms, no biases, no window.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for a missing, ill-typed or contradictory
    /// key.
    pub(crate) fn read(keys: Keys<'_>, rope: RopeDefaults) -> Result<Self> {
        let heads = keys.size("num_attention_heads")?;
        let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads {heads}");
            return Err(keys.wrong("num_key_value_heads", &expected, kv_heads));
        }
        let head_dim = match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => keys.size("hidden_size")? / heads,
        };
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            out_bias: false,
            clip: None,
            window: None,
            rope: Some(Rope::parse(keys, head_dim, rope)?),
            gated: false,
            sinks: false,
        })
    }

    /// The same in every layer.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) without a number of layers.
    pub(crate) fn in_every_layer(self, keys: Keys<'_>) -> Result<Vec<MixerSpec>> {
        Ok(vec![MixerSpec::Grouped(self); keys.size("num_hidden_layers")?])
    }

    /// With a window in some layers.
    pub(crate) fn windowed(
        self,
        windows: impl IntoIterator<Item = Option<usize>>,
    ) -> Vec<MixerSpec> {
        let with = |window| MixerSpec::Grouped(Self { window, ..self.clone() });
        windows.into_iter().map(with).collect()
    }
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LatentSpec {
    /// Number of heads.
    pub(crate) heads: usize,
    /// Rank of the query's latent; `None` is a full projection.
    pub(crate) q_rank: Option<usize>,
    /// Rank of the common latent of keys and values.
    pub(crate) kv_rank: usize,
    /// Width of the part of a key that is not rotated.
    pub(crate) d_nope: usize,
    /// Width of the rotated part.
    pub(crate) d_rope: usize,
    /// Width of a value.
    pub(crate) d_value: usize,
    /// Biases on the projections to the latents and on the output.
    pub(crate) bias: bool,
    /// Position embedding.
    pub(crate) rope: Rope,
}

/// Gated delta net (arXiv 2412.06464).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DeltaNetSpec {
    /// Number of query and key heads; each serves as many consecutive value heads.
    pub(crate) key_heads: usize,
    /// Number of value heads.
    pub(crate) value_heads: usize,
    /// Width of a query or key.
    pub(crate) d_key: usize,
    /// Width of a value.
    pub(crate) d_value: usize,
    /// Taps of the convolution.
    pub(crate) kernel: usize,
    /// Whether projections lie together, by key head, in `in_proj_qkvz` and `in_proj_ba`.
    pub(crate) together: bool,
}

impl DeltaNetSpec {
    /// Channels of the convolution: all queries, keys and values.
    pub(crate) fn channels(&self) -> usize {
        2 * self.key_heads * self.d_key + self.value_heads * self.d_value
    }
}

/// What mixes the tokens of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum MixerSpec {
    /// Attention with grouped queries.
    Grouped(GroupedSpec),
    /// Attention with latent keys and values.
    Latent(LatentSpec),
    /// Gated delta net.
    DeltaNet(DeltaNetSpec),
}

impl MixerSpec {
    /// The position embedding, if it has one.
    pub(crate) fn rope(&self) -> Option<&Rope> {
        match self {
            Self::Grouped(grouped) => grouped.rope.as_ref(),
            Self::Latent(latent) => Some(&latent.rope),
            Self::DeltaNet(_) => None,
        }
    }

    /// Numbers that are kept of `tokens` tokens of one sequence while it is continued.
    pub(crate) fn state_numbers(&self, tokens: usize) -> usize {
        match self {
            Self::Grouped(s) => 2 * tokens * s.kv_heads * s.head_dim,
            Self::Latent(s) => tokens * s.heads * (s.d_nope + s.d_rope + s.d_value),
            Self::DeltaNet(s) => {
                s.value_heads * s.d_key * s.d_value + (s.kernel - 1) * s.channels()
            }
        }
    }
}

/// Experts that every token visits, beside the routed ones.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum SharedSpec {
    /// None.
    None,
    /// One MLP `mlp.shared_experts` of this width (DeepSeek, GLM-4, dots1, ERNIE).
    Plain(usize),
    /// One MLP `mlp.shared_expert` of this width, times `sigmoid(w · x)` (Qwen2-MoE).
    SigmoidGated(usize),
}

impl SharedSpec {
    /// As many experts as `key` says, in one MLP.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for an ill-typed or missing key.
    pub(crate) fn plain(keys: Keys<'_>, key: &str, default: usize) -> Result<Self> {
        Ok(match keys.count(key)?.unwrap_or(default) {
            0 => Self::None,
            n => Self::Plain(n * keys.size("moe_intermediate_size")?),
        })
    }
}

/// A decoder-only model, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderSpec {
    /// Width of the residual stream.
    pub(crate) d_model: usize,
    /// Number of layers.
    pub(crate) layers: usize,
    /// Number of token ids.
    pub(crate) vocab: usize,
    /// The norms over the residual stream, and those on queries and keys.
    pub(crate) norm: NormSpec,
    /// What mixes the tokens of each layer.
    pub(crate) mixers: Vec<MixerSpec>,
    /// Width of dense MLPs; needed when a layer is dense.
    pub(crate) d_dense: Option<usize>,
    /// Biases in dense and shared MLPs.
    pub(crate) mlp_bias: bool,
    /// The non-linearity of dense and shared MLPs.
    pub(crate) activation: Activation,
    /// Shared experts.
    pub(crate) shared: SharedSpec,
    /// Whether the embedding is also the output projection.
    pub(crate) tied: bool,
    /// Token ids that end a generation.
    pub(crate) end: Vec<u32>,
    /// Most tokens that a window may hold.
    pub(crate) longest_window: usize,
    /// What sets that limit.
    pub(crate) limit: &'static str,
}

impl DecoderSpec {
    /// What the usual keys say; no shared experts, no biases. `eps` is the class default.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for a missing or ill-typed key,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for another activation.
    pub(crate) fn read(keys: Keys<'_>, eps: f64, mixers: Vec<MixerSpec>) -> Result<Self> {
        let ropes = mixers.iter().filter_map(MixerSpec::rope);
        let longest = match ropes.map(Rope::longest_window).min() {
            Some(longest) => longest,
            None => keys.size("max_position_embeddings")?,
        };
        let eps = keys.number("rms_norm_eps")?.unwrap_or(eps) as f32;
        Ok(Self {
            d_model: keys.size("hidden_size")?,
            layers: keys.size("num_hidden_layers")?,
            vocab: keys.size("vocab_size")?,
            norm: NormSpec { kind: NormKind::Rms, eps },
            mixers,
            d_dense: keys.optional_size("intermediate_size")?,
            mlp_bias: false,
            activation: activation(keys, "hidden_act")?,
            shared: SharedSpec::None,
            tied: keys.flag("tie_word_embeddings", false)?,
            end: keys.tokens("eos_token_id")?,
            longest_window: longest,
            limit: "max_position_embeddings",
        })
    }
}
