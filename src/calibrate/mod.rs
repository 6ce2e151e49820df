//! Routing statistics: collected from what a forward pass shows ([`Collector`]), and the import and
//! export of the interchange format.
//!
//! The format is one safetensors file for a whole model, described in `docs/STATISTICS.md`. It can
//! hold hundreds of megabytes of per-token observations per layer, so nothing but its header is
//! read when it is opened: [`StatsFile::layer`] reads what one layer's stages asked for.

mod collect;
mod collect_rows;
mod file;
mod header;
mod json_stats;
mod layer;
mod parts;
mod tensor;
pub mod text;
mod writer;

pub use collect::{Batch, Collector};
pub use file::StatsFile;
pub use json_stats::{statistics_from_json, statistics_to_json};
pub use writer::{StatsWriter, write_stats};
