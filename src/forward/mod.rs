//! The native forward pass: text through a model, one layer in memory at a time.
//!
//! The unit is a layer: [`DecoderLayer::load`] reads it, [`DecoderLayer::forward`] takes the hidden
//! states of *all* windows through it, and it is dropped before the next is read. Its halves are
//! separate, so that an [`Observer`] can look at input, routing and output of the MoE block, and so
//! that a merged layer can stand in for the routed experts ([`Mlp::add_to`]).
//!
//! What is particular about a family is data, read from `config.json` into a [`Spec`]; attention,
//! norms, experts and head are shared. Everything is computed in `f32`; sums are added in a fixed
//! order, so results have the same bits for every number of threads.
//!
//! The reference is transformers: logits agree to the rounding of `f32`.
//!
mod attend;
mod attention;
mod causal;
mod decoder;
mod dense;
mod factored;
mod family;
mod feed;
mod head;
mod keys;
mod load;
mod math;
mod mla;
mod mlp;
mod model;
mod moe;
mod norm;
mod rope;
mod rotation;
mod scratch;
mod spec;
mod spec_grouped;
mod switch;
mod switch_greedy;
mod t5;

pub use causal::{Causal, Hidden};
pub use decoder::DecoderLayer;
pub use dense::Shared;
pub use family::Family;
pub use feed::{FeedForward, Mlp, Observation, Observer};
pub use head::Head;
pub use model::Model;
pub use moe::{Choice, Routed, Watched, route, routed_sum, routed_sum_watched};
pub use norm::RmsNorm;
pub use rope::{Rope, Scaling};
pub use rotation::Pairing;
pub use spec::{AttentionSpec, GroupedSpec, LatentSpec, QkNorm, SharedSpec, Spec};
pub use switch::{Switch, SwitchSpec};
pub use t5::SwitchBlock;
