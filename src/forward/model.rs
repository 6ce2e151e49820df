//! A model of any native family.

use crate::error::Result;
use crate::families::{self, Forward};
use crate::forward::causal::Causal;
use crate::forward::encoder_decoder::Switch;
use crate::model::TensorSource;
use crate::stage::Context;

/// A model over a source of weights, of the kind that its configuration names.
#[derive(Debug)]
#[non_exhaustive]
pub enum Model<S> {
    /// A decoder-only model.
    Causal(Causal<S>),
    /// An encoder-decoder model.
    Switch(Switch<S>),
}

impl<S: TensorSource> Model<S> {
    /// Reads and checks the configuration; passes run on the CPU.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a family without a native
    /// forward pass, [`ErrorKind::Config`](crate::ErrorKind::Config) for an invalid configuration.
    pub fn open(source: S) -> Result<Self> {
        Self::open_on(source, Context::cpu(0))
    }

    /// As [`open`](Self::open), on a given device.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(source: S, cx: Context) -> Result<Self> {
        Ok(match families::forward(source.config())? {
            Forward::EncoderDecoder(_) => Self::Switch(Switch::open(source, cx)?),
            _ => Self::Causal(Causal::open(source, cx)?),
        })
    }

    /// The decoder-only model, if it is one.
    pub fn causal(&self) -> Option<&Causal<S>> {
        match self {
            Self::Causal(model) => Some(model),
            Self::Switch(_) => None,
        }
    }

    /// The encoder-decoder model, if it is one.
    pub fn switch(&self) -> Option<&Switch<S>> {
        match self {
            Self::Causal(_) => None,
            Self::Switch(model) => Some(model),
        }
    }
}
