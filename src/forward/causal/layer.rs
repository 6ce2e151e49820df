//! One decoder layer, in two halves: attention, then dense MLP or experts.

use std::ops::Range;

use ndarray::{Array2, s};

use super::mixer::{Mixer, SequenceState, State};
use crate::error::{Error, Locate, Result};
use crate::families::{DecoderSpec, Keys};
use crate::forward::load::Loader;
use crate::forward::moe::{FeedForward, Mlp, Observer, Shared};
use crate::forward::norm::RmsNorm;
use crate::forward::windows::{batches, check_windows};
use crate::model::{LayerId, TensorSource};
use crate::stage::Context;

/// One layer of a decoder-only model, in memory: `h ← h + A(norm h)`, then `h ← h + M(norm h)`.
///
/// Hidden states of all windows are stacked: `hidden: (t, d_model)`, and `windows` are consecutive
/// ranges of its rows. The two halves are separate, so that a caller can look at the input of the
/// MoE block, or put merged experts in the place of the routed ones.
#[derive(Debug)]
pub struct DecoderLayer {
    id: LayerId,
    mixer_norm: RmsNorm,
    mixer: Mixer,
    feed: FeedForward,
}

impl DecoderLayer {
    /// Reads layer `index`; the source may then release what it mapped.
    ///
    /// # Errors
    /// Those of the source; [`ErrorKind::Shape`](crate::ErrorKind::Shape) for a tensor that does
    /// not fit the configuration and [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a
    /// NaN or infinite weight, with layer and tensor.
    pub(crate) fn load(
        source: &dyn TensorSource,
        spec: &DecoderSpec,
        index: usize,
    ) -> Result<Self> {
        let id = LayerId::causal(index);
        let prefix = format!("{}layers.{index}.", source.prefix());
        let layer = Self::read(source, spec, id, &prefix).in_layer(id)?;
        source.release(&prefix);
        Ok(layer)
    }

    fn read(
        source: &dyn TensorSource,
        spec: &DecoderSpec,
        id: LayerId,
        prefix: &str,
    ) -> Result<Self> {
        let loader = Loader::new(source, prefix);
        let mlp = loader.at("mlp");
        let d = spec.d_model;
        let mlp = if source.is_moe(id) {
            let shared = Shared::load(&mlp, spec)?.map(Box::new);
            Mlp::sparse(source, id, shared, None)?
        } else {
            let Some(f) = spec.d_dense else {
                let keys = Keys::root(source.config());
                return Err(keys.wrong("intermediate_size", "the width of dense MLPs", "nothing"));
            };
            Mlp::Dense(Box::new(mlp.gated((d, f), spec.activation, spec.mlp_bias)?))
        };
        let norm = loader.norm("post_attention_layernorm", d, spec.norm)?;
        let mixer = spec.mixers.get(id.index);
        let mixer = mixer.ok_or_else(|| Error::range("layer", spec.layers, id.index))?;
        Ok(Self {
            id,
            mixer_norm: loader.norm("input_layernorm", d, spec.norm)?,
            mixer: Mixer::load(&loader, spec, mixer)?,
            feed: FeedForward::new(id, norm, mlp),
        })
    }

    /// Which layer it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The second half of the layer.
    pub fn feed(&self) -> &FeedForward {
        &self.feed
    }

    /// The same, to take its experts out.
    pub fn feed_mut(&mut self) -> &mut FeedForward {
        &mut self.feed
    }

    /// `h ← h + A(norm h)`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for windows that are not consecutive
    /// ranges over all rows.
    pub fn attention_half(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<()> {
        check_windows(windows, hidden.nrows())?;
        for batch in batches(windows) {
            let (first, end) = (batch[0].start, batch[batch.len() - 1].end);
            let local: Vec<_> = batch.iter().map(|w| w.start - first..w.end - first).collect();
            let mut rows = hidden.slice_mut(s![first..end, ..]);
            let x = self.mixer_norm.forward(rows.view())?;
            rows += &self.mixer.forward(x.view(), &local, cx).in_layer(self.id)?;
        }
        Ok(())
    }

    /// Both halves.
    ///
    /// # Errors
    /// Those of the halves.
    pub fn forward(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        self.attention_half(hidden, windows, cx)?;
        self.feed.forward(hidden, windows, observer, cx)
    }

    /// What the layer keeps before the first token of a window.
    pub(crate) fn start(&self) -> State {
        self.mixer.start()
    }

    /// Both halves for the next tokens of one window, whose past is in `state`.
    pub(crate) fn step(
        &self,
        hidden: &mut Array2<f32>,
        state: &mut State,
        cx: &Context,
    ) -> Result<()> {
        let rows = 0..hidden.nrows();
        let x = self.mixer_norm.forward(hidden.view())?;
        *hidden += &self.mixer.step(x.view(), state, cx).in_layer(self.id)?;
        self.feed.forward(hidden, &[rows], None, cx)
    }

    /// What the layer keeps before the first token of many sequences of up to `room` tokens.
    pub(crate) fn start_each(&self, sequences: usize, room: usize) -> SequenceState {
        self.mixer.start_each(sequences, room)
    }

    /// Both halves for the next token of every sequence, one row each.
    pub(crate) fn step_each(
        &self,
        hidden: &mut Array2<f32>,
        state: &mut SequenceState,
        cx: &Context,
    ) -> Result<()> {
        let rows: Vec<Range<usize>> = (0..hidden.nrows()).map(|i| i..i + 1).collect();
        let x = self.mixer_norm.forward(hidden.view())?;
        *hidden += &self.mixer.step_each(x.view(), state, cx).in_layer(self.id)?;
        self.feed.forward(hidden, &rows, None, cx)
    }
}
