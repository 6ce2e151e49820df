//! Merge, then compress: fewer, smaller experts for Sparse Mixture-of-Experts (SMoE) checkpoints.
//!
//! Mixtral, Qwen3-MoE, DeepSeek and their kin hold most of their weights in experts, and many
//! experts are redundant. *Merge, Then Compress* (Li et al., ICLR 2024, arXiv 2310.01334) lets the
//! router say which. This crate reads a Hugging Face checkpoint, merges the experts that the router
//! treats alike, and writes a checkpoint that runs; one layer is in memory at a time.
//!
//! ```no_run
//! use mcsmoe::pipeline::{Keep, Recipe, merge_then_compress};
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let recipe = Recipe::preset("fast", Keep::Fraction(0.5))?;
//! let report = merge_then_compress("Mixtral-8x7B", "texts", "Mixtral-4x7B", &recipe)?;
//! println!("{} experts are left of {}", report.experts.after, report.experts.before);
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! Data flows one way, and every method is a trait with one required method in [`stage`]:
//!
//! 1. [`checkpoint`] opens the source: memory-mapped shards, layers recognised by tensor names.
//! 2. [`calibrate`] reads the routing statistics, or [`forward`] computes them from text.
//! 3. [`similarity`] measures how alike the experts of a layer are ([`stage::Similarity`]).
//! 4. [`group`] decides, over all layers at once, which become one ([`stage::Grouper`]).
//! 5. [`align`] permutes hidden units, so that an average means something ([`stage::Aligner`]).
//! 6. [`merge`] makes one expert of each group ([`stage::Merger`]) and, for runtimes without an
//!    expert map, a router with one row per group ([`stage::RouterMerger`]).
//! 7. [`recover`] refits merged experts to the original layer's output ([`stage::Recoverer`]).
//! 8. [`checkpoint`] writes the target; it appears complete or not at all.
//!
//! [`decompose`] makes merged experts smaller ([`stage::Compressor`]), matrices as low rank plus
//! dense rows ([`stage::Decomposer`]): the paper's second half, `compress` in a recipe, between
//! recovery and writing.
//!
//! [`pipeline`] is the only module that knows this order. The values that stages exchange are in
//! [`model`] and valid by construction; [`linalg`] has the arithmetic. The same input gives the
//! same bytes at any number of threads. `report`, behind a feature of that name, shows a run as a
//! page with pictures and as a model card.
//!
//! # A stage of one's own
//!
//! ```
//! use mcsmoe::prelude::*;
//!
//! /// Experts are alike when the router reads the same input directions for them.
//! #[derive(Debug)]
//! struct RowDistance;
//!
//! impl Stage for RowDistance {
//!     fn name(&self) -> &str {
//!         "row-distance"
//!     }
//! }
//!
//! impl Similarity for RowDistance {
//!     fn similarity(&self, layer: &LayerView<'_>, _: &Context) -> Result<SimilarityMatrix> {
//!         let rows = layer.router.weight();
//!         SimilarityMatrix::from_pairs(layer.len(), |i, j| {
//!             let gap = &rows.row(i) - &rows.row(j);
//!             let distance = f64::from(gap.dot(&gap)).sqrt();
//!             Ok((1.0 / (1.0 + distance), distance))
//!         })
//!     }
//! }
//! ```
//!
//! `Pipeline::builder().similarity(RowDistance)` uses it beside the built-in stages; see
//! `examples/custom_similarity.rs` for a whole run.

pub mod align;
pub mod calibrate;
pub mod checkpoint;
pub mod decompose;
mod digest;
pub mod error;
mod families;
pub mod forward;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod group;
pub mod linalg;
pub mod merge;
pub mod model;
mod par;
pub mod pipeline;
pub mod prelude;
pub mod recover;
#[cfg(feature = "report")]
pub mod report;
pub mod similarity;
pub mod stage;
mod tensor_file;

/// The matrices of this crate's API, in the version that it uses.
#[doc(no_inline)]
pub use ndarray;

pub use error::{Error, ErrorKind, Result};
pub use pipeline::{Pipeline, Recipe, Report, merge_then_compress};
