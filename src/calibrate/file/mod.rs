//! Statistics files: read and written one layer at a time, and their form as JSON.

mod json;
mod layer;
mod stats_file;
mod tensor;
pub(super) mod tensor_names;
mod writer;

pub use json::{statistics_from_json, statistics_to_json};
pub use stats_file::StatsFile;
pub use writer::{StatsWriter, write_stats};
