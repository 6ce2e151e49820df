//! Statistics of one layer, collected batch by batch.

mod collector;
mod sample_rows;

pub use collector::{Batch, Collector};
