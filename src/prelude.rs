//! The traits and the names that a program that plugs in its own stage needs.

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
