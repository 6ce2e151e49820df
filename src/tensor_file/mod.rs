//! The safetensors format and the JSON around it: the only readers of untrusted headers, shared by
//! checkpoints, statistics files and token ids.
//!
//! A file is the length of its header as a little-endian `u64`, the header as JSON, and the data.
//! The header maps every name to an element type ([`Dtype`]), a shape and a range of bytes
//! ([`Header`]). It is read strictly: every byte of the data belongs to exactly one tensor.

mod dtype;
mod explain;
mod header;
mod json;
mod read_at;

pub(crate) use dtype::{Dtype, FLOATS};
pub(crate) use explain::{dangling, not_json, open_error};
pub(crate) use header::{Header, NewTensor, TensorEntry, encode_header};
pub(crate) use json::{Members, read_json};
pub(crate) use read_at::read_at;
