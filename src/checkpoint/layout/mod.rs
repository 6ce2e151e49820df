//! From tensor names to MoE layers: how families name and shape the tensors of their experts, which
//! of them a checkpoint holds, and how its routers choose.

mod factors;
pub(crate) mod names;
pub(crate) mod routing_rules;
pub(crate) mod scan;
mod scan_fused;
mod scan_layer;
mod table;

pub use factors::Factoring;
pub(crate) use factors::{Factor, Factors, is_index, line_shape};
pub(crate) use scan_layer::{LayerTensors, Order, Piece, Projection};
