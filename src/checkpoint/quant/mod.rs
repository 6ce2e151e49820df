//! Quantised weights: which tensors of a checkpoint are quantised, and the values they stand for.

mod fp8;
pub(crate) mod mxfp4;
pub(crate) mod schemes;

pub(crate) use schemes::{Quantised, Scheme};
