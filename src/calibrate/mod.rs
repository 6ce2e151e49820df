//! Routing statistics: collected from what a forward pass shows ([`Collector`]), and the import and
//! export of the interchange format.
//!
//! The format is one safetensors file for a whole model, described in `docs/STATISTICS.md`. It can
//! hold hundreds of megabytes of per-token observations per layer, so nothing but its header is
//! read when it is opened: [`StatsFile::layer`] reads what one layer's stages asked for.

mod collect;
mod file;
mod input;
pub mod text;

pub use collect::{Batch, Collector};
pub use file::{StatsFile, StatsWriter, statistics_from_json, statistics_to_json, write_stats};
pub use input::InputKind;
