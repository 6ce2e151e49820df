//! Switch Transformers: encoder, decoder, and the passes through both.

mod block;
mod greedy;

use std::ops::Range;

use ndarray::{Array2, s};

use crate::error::{Error, Result};
use crate::families::{self, NormKind, NormSpec, SwitchSpec};
use crate::forward::head::Head;
use crate::forward::load::Loader;
use crate::forward::moe::Observer;
use crate::forward::norm::RmsNorm;
use crate::forward::windows::{Hidden, check_tokens, gather};
use crate::model::{Finite, LayerId, Stack, TensorSource};
use crate::stage::Context;

pub use block::SwitchBlock;
use block::stack_prefix;

/// The norms of a T5.
fn norm(spec: &SwitchSpec) -> NormSpec {
    NormSpec { kind: NormKind::Rms, eps: spec.eps }
}

/// A Switch model over a source of weights. As [`Causal`](super::Causal) it holds no weights:
/// encoder blocks, then decoder blocks are read one at a time.
///
/// Every sequence is one window without padding; expert capacity counts per window.
#[derive(Debug)]
pub struct Switch<S> {
    source: S,
    spec: SwitchSpec,
    pub(crate) cx: Context,
}

impl<S: TensorSource> Switch<S> {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for another family,
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for an invalid configuration.
    pub fn open(source: S, cx: Context) -> Result<Self> {
        let spec = families::encoder_decoder(source.config())?;
        Ok(Self { source, spec, cx })
    }

    /// The model's description.
    pub(crate) fn spec(&self) -> &SwitchSpec {
        &self.spec
    }

    /// The decoder's input when it is to produce `targets`: shifted right behind the start token.
    pub fn shifted(&self, targets: &[u32]) -> Vec<u32> {
        self.spec.shifted(targets)
    }

    /// Embeds the tokens of every window of a stack.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for an empty window or a token id
    /// outside the vocabulary; those of the source.
    pub fn embed(&self, stack: Stack, windows: &[impl AsRef<[u32]>]) -> Result<Hidden> {
        for window in windows.iter().map(AsRef::as_ref) {
            if window.is_empty() {
                return Err(Error::range("window", "at least one token", 0));
            }
            check_tokens(window, self.spec.vocab)?;
        }
        Ok(gather(&self.table(stack)?, windows))
    }

    /// The embedding of a stack: a common one, unless the model is not tied and stores its own.
    pub(crate) fn table(&self, stack: Stack) -> Result<Array2<f32>> {
        let (own, common) = (stack_prefix(&self.source, stack), self.source.prefix());
        let own = format!("{own}embed_tokens.weight");
        let common = format!("{common}shared.weight");
        let use_own = self.source.has(&own) && !(self.spec.tied && self.source.has(&common));
        let name = if use_own { own } else { common };
        Loader::new(&self.source, "").matrix(&name, (self.spec.vocab, self.spec.d_model))
    }

    /// Reads block `index` of the encoder or decoder.
    ///
    /// # Errors
    /// Those of the source; a tensor that does not fit the configuration or is not finite.
    pub fn block(&self, stack: Stack, index: usize) -> Result<SwitchBlock> {
        SwitchBlock::load(&self.source, &self.spec, LayerId { stack, index })
    }

    /// The encoder's output after its final norm.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed), [`block`](Self::block) and the block's halves.
    pub fn encode(
        &self,
        windows: &[impl AsRef<[u32]>],
        observer: Option<&mut dyn Observer>,
    ) -> Result<Hidden> {
        let mut hidden = self.embed(Stack::Encoder, windows)?;
        self.stack(Stack::Encoder, &mut hidden, None, observer)?;
        hidden.states = self.final_norm(Stack::Encoder)?.forward(hidden.states.view())?;
        Ok(hidden)
    }

    /// The norm behind the last block of a stack. Decoder blocks attend to the encoder's states
    /// after it.
    ///
    /// # Errors
    /// Those of the source; a shape that does not fit or a value that is not finite.
    pub fn final_norm(&self, stack: Stack) -> Result<RmsNorm> {
        let loader = Loader::new(&self.source, stack_prefix(&self.source, stack));
        loader.norm("final_layer_norm", self.spec.d_model, norm(&self.spec))
    }

    /// The decoder's states before its final norm; window `i` attends to encoder window `i`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn decode(
        &self,
        windows: &[impl AsRef<[u32]>],
        encoded: &Hidden,
        observer: Option<&mut dyn Observer>,
    ) -> Result<Hidden> {
        let mut hidden = self.embed(Stack::Decoder, windows)?;
        self.stack(Stack::Decoder, &mut hidden, Some(encoded), observer)?;
        Ok(hidden)
    }

    fn stack(
        &self,
        stack: Stack,
        hidden: &mut Hidden,
        encoded: Option<&Hidden>,
        mut observer: Option<&mut dyn Observer>,
    ) -> Result<()> {
        let encoder = stack == Stack::Encoder;
        let layers = if encoder { self.spec.encoder_layers } else { self.spec.decoder_layers };
        let encoded = encoded.map(|e| (e.states.view(), &e.windows[..]));
        for index in 0..layers {
            let block = self.block(stack, index)?;
            let observer = observer.as_mut().map(|o| &mut **o as &mut dyn Observer);
            let Hidden { states, windows } = &mut *hidden;
            block.attention_half(states, windows, encoded, &self.cx)?;
            block.feed().forward(states, windows, observer, &self.cx)?;
        }
        Ok(())
    }

    /// Reads the final norm and the output projection.
    ///
    /// # Errors
    /// Those of the source; a shape that does not fit or a value that is not finite.
    pub fn head(&self) -> Result<Head> {
        let d = self.spec.d_model;
        let norm = self.final_norm(Stack::Decoder)?;
        if self.spec.tied {
            return Ok(Head::new(norm, self.table(Stack::Encoder)?, 1.0 / (d as f32).sqrt()));
        }
        let outer = Loader::new(&self.source, self.source.prefix());
        Ok(Head::new(norm, outer.matrix("lm_head.weight", (self.spec.vocab, d))?, 1.0))
    }

    /// Logits of every decoder token of one pair of sequences: `(t, vocab)`.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode), [`decode`](Self::decode) and [`head`](Self::head).
    pub fn logits(&self, encoder: &[u32], decoder: &[u32]) -> Result<Array2<f32>> {
        let encoded = self.encode(&[encoder], None)?;
        let hidden = self.decode(&[decoder], &encoded, None)?;
        let logits = self.head()?.logits(hidden.states.view(), self.cx.compute())?;
        logits.check_finite("logits")?;
        Ok(logits)
    }

    /// Per pair of input and targets the sum of `−ln p(target)` over all targets, in nats, and the
    /// number of terms. The decoder reads the targets shifted right.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn nll(&self, pairs: &[(Vec<u32>, Vec<u32>)]) -> Result<Vec<(f64, usize)>> {
        let hidden = self.run(pairs, None)?;
        let head = self.head()?;
        let each = pairs.iter().zip(&hidden.windows);
        let nll = |((_, targets), rows): (&(_, Vec<u32>), &Range<usize>)| {
            let states = hidden.states.slice(s![rows.clone(), ..]);
            let terms = head.nll(states, targets, &self.cx)?;
            Ok((terms.iter().sum(), terms.len()))
        };
        each.map(nll).collect()
    }

    /// Encoder, then decoder, for pairs of input and targets; returns the decoder's states.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode) and [`decode`](Self::decode); an empty list of targets.
    pub fn run(
        &self,
        pairs: &[(Vec<u32>, Vec<u32>)],
        mut observer: Option<&mut dyn Observer>,
    ) -> Result<Hidden> {
        if pairs.iter().any(|(_, targets)| targets.is_empty()) {
            return Err(Error::range("targets", "at least one token", 0));
        }
        let inputs: Vec<&[u32]> = pairs.iter().map(|(input, _)| &input[..]).collect();
        let shifted: Vec<_> = pairs.iter().map(|(_, targets)| self.spec.shifted(targets)).collect();
        let first = observer.as_mut().map(|o| &mut **o as &mut dyn Observer);
        let encoded = self.encode(&inputs, first)?;
        self.decode(&shifted, &encoded, observer)
    }
}
