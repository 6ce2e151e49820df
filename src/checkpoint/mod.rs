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
mod config_text;
mod dequantise;
mod dtype;
mod encode;
mod factors;
mod folder;
mod fp8;
mod header;
mod json;
mod layout;
mod layout_table;
mod mmap;
mod mxfp4;
mod native;
mod open;
mod outline;
mod part;
mod quant;
mod read;
mod rule;
mod scan;
mod scan_fused;
mod scan_layer;
mod source;
mod stamp;
mod store;
mod write;
mod write_check;
mod write_config;
mod write_file;
mod write_finish;
mod write_layer;
mod write_plan;
mod write_size;
mod write_target;

pub use config::Config;
pub use encode::{Encoded, Encoder};
pub use factors::Factoring;
pub(crate) use json::read_json;
pub use open::{Checkpoint, LayerInfo};
pub use outline::{Fate, Outline, OutlineTensor};
pub use part::Part;
pub use write::{Export, MANIFEST, WritePlan, Writer, Written};
pub use write_size::Sizes;
pub use write_target::Partial;
