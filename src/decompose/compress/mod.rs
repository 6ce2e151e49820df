//! Compressors of a whole merged layer ([`Compressor`](crate::stage::Compressor)). One a file.
//!
//! | compressor | makes smaller | in a native folder |
//! |---|---|---|
//! | [`PerMatrix`] | each matrix, by a [`Decomposer`](crate::stage::Decomposer) | factors |
//! | [`BySensitivity`] | each matrix, by the gradients of the loss | factors |
//! | [`NeuronPruning`] | each expert, by whole hidden units | smaller experts, or factors |
//! | [`SharedDeltas`] | all experts of a layer, around one base | refused |

mod budget;
mod layer_inputs;
mod neuron_pruning;
mod per_matrix;
mod sensitivity;
mod shared_deltas;
mod size;
mod survey;

pub use budget::{CompressionBudget, MatrixBudget};
pub use neuron_pruning::NeuronPruning;
pub use per_matrix::PerMatrix;
pub use sensitivity::BySensitivity;
pub use shared_deltas::SharedDeltas;
pub use size::allocate_bytes;
