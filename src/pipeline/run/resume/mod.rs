//! What an interrupted run leaves, and how another goes on from it.

pub(in crate::pipeline) mod fingerprint;
pub(in crate::pipeline) mod hidden_states;
pub(in crate::pipeline) mod journal;
