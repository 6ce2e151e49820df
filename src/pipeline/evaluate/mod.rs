//! How well a checkpoint predicts text, alone or beside the original, and what it writes.

pub(super) mod compare;
pub(super) mod generation;
pub(super) mod perplexity;
