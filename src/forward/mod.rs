//! The native forward pass: text through a model, one layer in memory at a time.
//!
//! The unit is a layer: one call reads it, [`DecoderLayer::forward`] takes the hidden
//! states of *all* windows through it, and it is dropped before the next is read. Its halves are
//! separate, so that an [`Observer`] can look at input, routing and output of the MoE block, and so
//! that a merged layer can stand in for the routed experts ([`Mlp::add_to`]).
//!
//! What is particular about a family is data, read from `config.json` by its table (the crate's
//! `families`); attention, norms, experts and head are shared. Everything is computed in `f32`;
//! sums are added in a fixed order, so results have the same bits for every number of threads.
//!
//! The reference is transformers: logits agree to the rounding of `f32`.

mod attention;
mod causal;
mod encoder_decoder;
mod head;
mod load;
mod math;
mod model;
mod moe;
mod norm;
mod recurrent;
mod windows;

pub use causal::{Causal, DecoderLayer, SampleOptions};
pub use encoder_decoder::{Switch, SwitchBlock};
pub use head::Head;
pub use model::Model;
pub use moe::{Choice, FeedForward, Mlp, Observation, Observer, Routed};
pub use moe::{route, routed_sum};
pub(crate) use windows::Hidden;
