//! Writing a merged checkpoint: the request, the layout of the target that follows from it, and
//! the files, layer by layer.

mod check;
mod companion_files;
mod dequantise;
mod encode;
mod file;
mod finish;
mod folder_listing;
mod layer;
mod layout_plan;
mod partial_target;
mod request;
mod size;
mod target;
mod target_config;
mod writer;

pub use encode::{Encoded, Encoder};
pub use folder_listing::{FolderListing, ListedTensor, SourceTensorUse};
pub use partial_target::Part;
pub use request::{Export, MANIFEST, WritePlan, Written};
pub use size::Sizes;
pub use target::Partial;
pub use writer::Writer;
