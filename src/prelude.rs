//! The names that a program with a stage of its own needs; see the example in [`crate::stage`].
//!
//! ```
//! use mcsmoe::prelude::*;
//!
//! # fn main() -> Result<()> {
//! let recipe = Recipe::preset("fast", Keep::Fraction(0.5))?;
//! # let _ = recipe;
//! # Ok(())
//! # }
//! ```

#[doc(no_inline)]
pub use crate::error::{Error, ErrorKind, Result};
#[doc(no_inline)]
pub use crate::model::{
    Budget, Expert, ExpertView, Factored, Grouping, LayerId, MoeLayer, Permutation, Router,
    RoutingStats, SimilarityMatrix,
};
#[doc(no_inline)]
pub use crate::pipeline::{Keep, Pipeline, Recipe, Report, merge_then_compress};
#[doc(no_inline)]
pub use crate::stage::{
    AlignPair, Aligner, Compressed, Compression, Compressor, Context, Decomposer, ExpertStorage,
    Grouper, LayerSummary, LayerView, Members, Merger, Moments, Needs, RankBudget, Recoverer,
    Recovery, RouterMerger, Similarity, Stage,
};
