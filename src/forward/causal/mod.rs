//! Decoder-only models: whole passes, streamed over layers; generation with a cache.

mod layer;
mod mixer;
mod sample;

use std::ops::Range;

use ndarray::{Array2, s};

use crate::error::{Error, Result};
use crate::families::{self, DecoderSpec};
use crate::forward::head::Head;
use crate::forward::load::Loader;
use crate::forward::moe::Observer;
use crate::forward::windows::{Hidden, check_tokens, gather};
use crate::model::{Finite, TensorSource};
use crate::stage::Context;

pub use layer::DecoderLayer;
pub use sample::SampleOptions;

/// A decoder-only model over a source of weights. It holds none itself: every pass reads the
/// embedding, then layer by layer, then the output projection, and drops each after use.
#[derive(Debug)]
pub struct Causal<S> {
    source: S,
    spec: DecoderSpec,
    cx: Context,
}

impl<S: TensorSource> Causal<S> {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a family without a native
    /// forward pass, [`ErrorKind::Config`](crate::ErrorKind::Config) for an invalid configuration.
    pub fn open(source: S, cx: Context) -> Result<Self> {
        let spec = families::decoder(source.config())?;
        Ok(Self { source, spec, cx })
    }

    /// The model's description.
    pub(crate) fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Number of token ids.
    pub fn vocab(&self) -> usize {
        self.spec.vocab
    }

    pub(super) fn context(&self) -> &Context {
        &self.cx
    }

    /// Embeds the tokens of every window: the start of a pass.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for an empty window, one that is
    /// longer than the model's context, or a token id outside the vocabulary; those of the source.
    pub fn embed(&self, windows: &[impl AsRef<[u32]>]) -> Result<Hidden> {
        windows.iter().try_for_each(|window| self.check(window.as_ref()))?;
        Ok(gather(&self.table()?, windows))
    }

    pub(super) fn check(&self, window: &[u32]) -> Result<()> {
        let longest = self.spec.longest_window;
        if window.is_empty() || window.len() > longest {
            let expected = format!("1 to {longest} tokens ({})", self.spec.limit);
            return Err(Error::range("window", expected, window.len()));
        }
        check_tokens(window, self.spec.vocab)
    }

    pub(super) fn table(&self) -> Result<Array2<f32>> {
        let loader = Loader::new(&self.source, self.source.prefix());
        loader.matrix("embed_tokens.weight", (self.spec.vocab, self.spec.d_model))
    }

    /// Reads layer `index`.
    ///
    /// # Errors
    /// Those of the source; a tensor that does not fit the configuration or is not finite.
    pub fn layer(&self, index: usize) -> Result<DecoderLayer> {
        DecoderLayer::load(&self.source, &self.spec, index)
    }

    /// Reads the final norm and the output projection.
    ///
    /// # Errors
    /// Those of the source; a shape that does not fit or a value that is not finite.
    pub fn head(&self) -> Result<Head> {
        Head::load(&self.source, &self.spec)
    }

    /// All windows through layer `l` before layer `l + 1` is read; one layer in memory at a time.
    ///
    /// # Errors
    /// Those of [`embed`](Self::embed), [`layer`](Self::layer), [`DecoderLayer::forward`].
    pub fn run(
        &self,
        windows: &[impl AsRef<[u32]>],
        mut observer: Option<&mut dyn Observer>,
    ) -> Result<Hidden> {
        let mut hidden = self.embed(windows)?;
        for index in 0..self.spec.layers {
            let layer = self.layer(index)?;
            // Each layer borrows the observer anew.
            let observer = observer.as_mut().map(|o| &mut **o as &mut dyn Observer);
            layer.forward(&mut hidden.states, &hidden.windows, observer, &self.cx)?;
        }
        Ok(hidden)
    }

    /// Logits of every token of one window: `(t, vocab)`. For small checks: all are held.
    ///
    /// # Errors
    /// Those of [`run`](Self::run) and [`head`](Self::head).
    pub fn logits(&self, tokens: &[u32]) -> Result<Array2<f32>> {
        let hidden = self.run(&[tokens], None)?;
        let logits = self.head()?.logits(hidden.states.view(), self.cx.compute())?;
        logits.check_finite("logits")?;
        Ok(logits)
    }

    /// Per window the sum of `−ln p(token | tokens before)` over all but the first token, in nats,
    /// and the number of terms.
    ///
    /// # Errors
    /// Those of [`run`](Self::run) and [`head`](Self::head).
    pub fn nll(&self, windows: &[impl AsRef<[u32]>]) -> Result<Vec<(f64, usize)>> {
        let hidden = self.run(windows, None)?;
        let head = self.head()?;
        let pairs = windows.iter().zip(&hidden.windows);
        let nll = |(window, rows): (&_, &Range<usize>)| {
            let targets = &AsRef::<[u32]>::as_ref(window)[1..];
            let states = hidden.states.slice(s![rows.start..rows.end - 1, ..]);
            let terms = head.nll(states, targets, &self.cx)?;
            Ok((terms.iter().sum(), terms.len()))
        };
        pairs.map(nll).collect()
    }

    /// The most likely continuation, one token at a time, until `max_new` tokens or the end token
    /// (which is included). Ties go to the smaller id.
    ///
    /// Unlike every other pass this one holds all layers, with their keys and values, in memory.
    /// With dynamic RoPE scaling, cached keys keep the rotation of the length at which they were
    /// made, as they do in transformers.
    ///
    /// # Errors
    /// Those of [`run`](Self::run) and [`head`](Self::head);
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when prompt and continuation are
    /// together longer than the model's context.
    pub fn generate(&self, tokens: &[u32], max_new: usize) -> Result<Vec<u32>> {
        Ok(self.generate_each(&[tokens], max_new)?.pop().unwrap_or_default())
    }

    /// As [`generate`](Self::generate), for each of several prompts; the weights are read once.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_each(
        &self,
        prompts: &[impl AsRef<[u32]>],
        max_new: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let longest = self.spec.longest_window;
        for prompt in prompts.iter().map(AsRef::as_ref) {
            let length = prompt.len().saturating_add(max_new);
            if length > longest {
                let expected = format!("at most {longest} tokens ({})", self.spec.limit);
                return Err(Error::range("prompt and continuation", expected, length));
            }
            self.check(prompt)?;
        }
        let table = self.table()?;
        let layers: Vec<_> = (0..self.spec.layers).map(|i| self.layer(i)).collect::<Result<_>>()?;
        let head = self.head()?;
        let greedy = |prompt| self.greedy(prompt, max_new, &table, &layers, &head);
        prompts.iter().map(AsRef::as_ref).map(greedy).collect()
    }

    fn greedy(
        &self,
        prompt: &[u32],
        max_new: usize,
        table: &Array2<f32>,
        layers: &[DecoderLayer],
        head: &Head,
    ) -> Result<Vec<u32>> {
        let mut hidden = gather(table, &[prompt]).states;
        let mut states: Vec<_> = layers.iter().map(DecoderLayer::start).collect();
        let mut new = Vec::with_capacity(max_new.min(4096));
        while new.len() < max_new {
            for (layer, state) in layers.iter().zip(&mut states) {
                layer.step(&mut hidden, state, &self.cx)?;
            }
            let last = hidden.slice(s![hidden.nrows() - 1.., ..]);
            let token = head.largest(last, &self.cx)?;
            new.push(token);
            if self.spec.end.contains(&token) {
                break;
            }
            if new.len() < max_new {
                hidden = gather(table, &[[token]]).states;
            }
        }
        Ok(new)
    }
}
