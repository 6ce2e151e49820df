//! From tensor names to MoE layers: which experts a checkpoint holds, by the layouts of the
//! families (`crate::families`).

mod factors;
pub(crate) mod names;
pub(crate) mod scan;
mod scan_fused;
mod scan_layer;
mod sparse_layers;
mod stack;

pub use factors::Factoring;
pub(crate) use factors::{Factor, Factors, is_index, kept_shape};
pub(crate) use scan_layer::{LayerTensors, Order, Piece, Projection};
