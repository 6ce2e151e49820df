//! The MoE block: routing, the experts that a token visits, shared experts, and the sum.

mod expert;
mod factored;
mod feed_forward;
mod mlp;
mod route;
mod scratch;
mod shared;
mod sum;

pub use feed_forward::{FeedForward, Mlp, Observation, Observer};
pub use route::{Choice, Routed, route};
pub(crate) use shared::Shared;
pub use sum::routed_sum;
