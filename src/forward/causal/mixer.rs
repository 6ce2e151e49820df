//! What mixes the tokens of a layer, of any kind, and what it keeps of those already seen.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use crate::error::{Error, Result};
use crate::families::{DecoderSpec, MixerSpec};
use crate::forward::attention::{Attention, Cache, SequenceCache};
use crate::forward::load::Loader;
use crate::forward::recurrent::{DeltaNet, DeltaState};
use crate::stage::Context;

/// The token mixer of one layer.
#[derive(Debug)]
pub(crate) enum Mixer {
    Attention(Box<Attention>),
    DeltaNet(Box<DeltaNet>),
}

/// What one layer keeps of the tokens of one window that were already seen.
#[derive(Debug, Clone)]
pub(crate) enum State {
    Attention(Cache),
    DeltaNet(DeltaState),
}

/// The same of many sequences side by side, all at the same position.
#[derive(Debug, Clone)]
pub(crate) enum SequenceState {
    Attention(SequenceCache),
    /// One a sequence.
    DeltaNet(Vec<DeltaState>),
}

impl Mixer {
    /// What it keeps, in words.
    fn name(&self) -> &'static str {
        match self {
            Self::Attention(_) => "keys and values",
            Self::DeltaNet(_) => "delta net",
        }
    }

    /// Reads the mixer of a layer whose tensors `loader` finds.
    pub(crate) fn load(loader: &Loader<'_>, spec: &DecoderSpec, mixer: &MixerSpec) -> Result<Self> {
        let (d, norm) = (spec.d_model, spec.norm);
        let attention = loader.at("self_attn");
        Ok(match mixer {
            MixerSpec::Grouped(grouped) => {
                Self::Attention(Box::new(Attention::grouped(&attention, grouped, d, norm)?))
            }
            MixerSpec::Latent(latent) => {
                Self::Attention(Box::new(Attention::latent(&attention, latent, d)?))
            }
            MixerSpec::DeltaNet(delta) => {
                let (loader, act) = (loader.at("linear_attn"), spec.activation);
                Self::DeltaNet(Box::new(DeltaNet::load(&loader, delta, d, norm.eps, act)?))
            }
        })
    }

    /// Mixes the tokens of each window of `X: (t, d_model)`, after the norm: `(t, d_model)`.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        match self {
            Self::Attention(attention) => attention.forward(x, windows, cx),
            Self::DeltaNet(delta) => delta.forward(x, windows, cx),
        }
    }

    /// What is kept before the first token.
    pub(crate) fn start(&self) -> State {
        match self {
            Self::Attention(_) => State::Attention(Cache::default()),
            Self::DeltaNet(delta) => State::DeltaNet(delta.start()),
        }
    }

    /// The next tokens of one window, of whose past `state` knows what the mixer needs.
    pub(crate) fn step(
        &self,
        x: ArrayView2<'_, f32>,
        state: &mut State,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        match (self, state) {
            (Self::Attention(attention), State::Attention(cache)) => attention.step(x, cache, cx),
            (Self::DeltaNet(delta), State::DeltaNet(state)) => delta.step(x, state, cx),
            (mixer, _) => Err(Error::shape("state of a layer", mixer.name(), "another kind")),
        }
    }

    /// What is kept before the first token of many sequences, with room for so many tokens each.
    pub(crate) fn start_each(&self, sequences: usize, room: usize) -> SequenceState {
        match self {
            Self::Attention(_) => SequenceState::Attention(SequenceCache::new(sequences, room)),
            Self::DeltaNet(delta) => SequenceState::DeltaNet(vec![delta.start(); sequences]),
        }
    }

    /// The next token of every sequence.
    pub(crate) fn step_each(
        &self,
        x: ArrayView2<'_, f32>,
        state: &mut SequenceState,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        match (self, state) {
            (Self::Attention(attention), SequenceState::Attention(cache)) => {
                attention.step_each(x, cache, cx)
            }
            (Self::DeltaNet(delta), SequenceState::DeltaNet(states)) => {
                delta.step_each(x, states, cx)
            }
            (mixer, _) => Err(Error::shape("state of a layer", mixer.name(), "another kind")),
        }
    }
}
