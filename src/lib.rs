//! Merge, then compress: fewer, smaller experts for Sparse Mixture-of-Experts checkpoints.

pub mod error;
pub mod linalg;
pub mod par;

pub use error::{Error, ErrorKind, Locate, Place, Result};
