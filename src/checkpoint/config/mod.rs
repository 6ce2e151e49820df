//! `config.json`: its values by key, edits that keep the rest of its text, and the expert map that
//! native folders keep in it.

mod document;
mod expert_map;
mod value_spans;

pub use document::Config;
pub(crate) use document::{EXPERTS, Edit, MTP, TOP_K, mismatch};
pub(crate) use expert_map::{NATIVE, Native};
