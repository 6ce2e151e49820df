//! Token mixers that keep a state of fixed size: linear attention and short convolutions.

mod convolution;
mod delta_net;
mod delta_rule;

pub(crate) use delta_net::{DeltaNet, DeltaState};
