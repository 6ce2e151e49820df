//! Reading a checkpoint: its files, mapped into memory; its tensors by name; its MoE layers as
//! experts and routers in `f32`.

mod checkpoint;
mod file_stamp;
mod folder;
mod memory_map;
pub(crate) mod shards;
mod store;
mod tensor_source;
pub(crate) mod weights;

pub use checkpoint::{Checkpoint, LayerInfo};
pub(crate) use store::{Store, Tensor};
