//! Checkpoints on disk: safetensors shards in and out, streamed layer by layer; tensor names per
//! family as data; element types other than `f32` exist only here.
//!
//! [`Checkpoint::open`] reads a Hugging Face folder: `config.json` and either one safetensors file
//! or shards with an index. Shards are memory-mapped, so opening costs the headers only, and
//! [`Checkpoint::release`] gives a layer's pages back once it is done with. It is a
//! [`TensorSource`](crate::model::TensorSource): the forward pass runs on it. A [`Writer`] takes
//! merged layers one at a time and writes one of three kinds of folder ([`Export`]); nothing is
//! seen under the target's name before it is complete. A native folder may hold experts in factors
//! ([`WritePlan::factored`]); they are multiplied out when they are read. It also holds
//! `modeling_mcsmoe.py`, with which transformers runs it when told to trust the folder's code.
//!
//! Quantised models are read as what their weights mean: FP8 (E4M3) with a scale per block, as
//! DeepSeek and Qwen publish, and the MXFP4 experts of gpt-oss. They are written dequantised: every
//! quantised tensor as bf16, merged or not, also when nothing is merged; without scales, which
//! [`Written::dropped`] lists, and without `quantization_config`.

mod config;
mod layout;
mod quant;
mod read;
mod write;

pub(crate) use crate::tensor_file::read_json;
pub use config::Config;
pub use layout::Factoring;
pub use read::{Checkpoint, LayerInfo};
pub use write::{
    Encoded, Encoder, Export, FolderListing, ListedTensor, MANIFEST, Part, Partial, Sizes,
    SourceTensorUse, WritePlan, Writer, Written,
};
