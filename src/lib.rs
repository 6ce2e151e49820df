//! Merge, then compress: fewer, smaller experts for Sparse Mixture-of-Experts checkpoints.

pub mod align;
pub mod calibrate;
pub mod checkpoint;
pub mod error;
pub mod forward;
pub mod group;
pub mod linalg;
pub mod merge;
pub mod model;
pub mod par;
pub mod pipeline;
pub mod similarity;
pub mod stage;

pub use error::{Error, ErrorKind, Locate, Place, Result};
