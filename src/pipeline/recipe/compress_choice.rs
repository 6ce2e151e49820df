//! The compressions that a recipe can name.

use serde::{Deserialize, Serialize};

use crate::decompose::{
    BySensitivity, Complement, LowRank, LowRankSparse, MatrixBudget, NeuronPruning, PerMatrix,
    RowScore, SharedBasis, SharedDeltas, SparseOnly, TruncatedSvd, Whitened,
};
use crate::error::{Error, Result};
use crate::model::Structure;
use crate::pipeline::builder::PipelineBuilder;
use crate::pipeline::recipe::choices::choices;
use crate::stage::{Portion, Size, SizeBudget};

choices! {
    /// In what factors the matrices of merged experts are kept; see [`crate::decompose`]. `rank` is
    /// 32 and `rows`, the share of dense rows, 0.1 (the paper) unless given; with `structure =
    /// "columns"` it is columns that stay dense.
    #[derive(Copy)]
    CompressChoice by "method", fn add_to(b: PipelineBuilder) -> Result<PipelineBuilder>;
    /// Truncated SVD plus the rows it misses most (the paper).
    "low-rank-sparse" LowRankSparse {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Which rows stay.
        #[serde(default)]
        score: RowScore,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    } => {
        let method = LowRankSparse { score, structure, ..LowRankSparse::default() };
        Ok(b.compressor(PerMatrix::new(method, budget(rank, Some(rows), structure)?)))
    };
    /// The same, with the rows of largest `|S ⊙ ∇S|`; needs gradients in the statistics.
    "low-rank-sensitive" LowRankSensitive {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    } => {
        let method = LowRankSparse { structure, ..LowRankSparse::default() };
        let budget = budget(rank, Some(rows), structure)?;
        Ok(b.compressor(BySensitivity { method, budget }))
    };
    /// Truncated SVD.
    "svd" Svd {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
    } => {
        let budget = budget(rank, None, Structure::Rows)?;
        Ok(b.compressor(PerMatrix::new(TruncatedSvd::default(), budget)))
    };
    /// Low rank fitted to the outputs on samples, which it needs.
    "whitened-svd" WhitenedSvd {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
    } => {
        let budget = budget(rank, None, Structure::Rows)?;
        Ok(b.compressor(PerMatrix::new(Whitened::default(), budget)))
    };
    /// Dense rows, and low rank fitted to the others.
    "complement" Complement {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    } => {
        let method = Complement { structure, ..Complement::default() };
        Ok(b.compressor(PerMatrix::new(method, budget(rank, Some(rows), structure)?)))
    };
    /// Dense rows only.
    "sparse" Sparse {
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Which rows stay.
        #[serde(default)]
        score: RowScore,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    } => {
        let method = SparseOnly { score, structure };
        let budget = MatrixBudget { rank: 0, rows: Some(rows), structure };
        Ok(b.compressor(PerMatrix::new(method, budget)))
    };
    /// Whole hidden units of gate, up and down; see [`NeuronPruning`].
    "neurons" Neurons {
        /// Share of hidden units, in (0, 1].
        keep: f64,
        /// `r` of what stands for the others; 0, unless given, makes experts of a smaller size.
        #[serde(default)]
        rank: usize,
    } => Ok(b.compressor(NeuronPruning { keep, rank, how: Complement::default() }));
    /// One base for a layer and deltas of low rank; see [`SharedDeltas`].
    "shared-basis" SharedBasis {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Whether all deltas share `R`.
        #[serde(default)]
        shared_right: bool,
    } => {
        let how = SharedBasis { shared_right, ..SharedBasis::default() };
        let MatrixBudget { rank, .. } = budget(rank, None, Structure::Rows)?;
        Ok(b.compressor(SharedDeltas { rank, how }))
    };
    /// Low rank of another rank for every matrix, so that a native folder has a given size; see
    /// [`SizeBudget`]. Fitted to the outputs where there are samples.
    "size" Size {
        /// How large: `{ percent = 20 }` or `{ bytes = 1000000 }`.
        size: Size,
        /// Of what.
        #[serde(default)]
        of: Portion,
        /// The least rank of any matrix.
        #[serde(default = "least")]
        least_rank: usize,
    } => {
        let budget = SizeBudget { size, of, least_rank };
        Ok(b.compressor(PerMatrix::new(LowRank::default(), budget)))
    };
}

fn paper_rank() -> usize {
    32
}

fn tenth() -> f64 {
    0.1
}

fn least() -> usize {
    1
}

/// What one matrix may keep.
fn budget(rank: usize, rows: Option<f64>, structure: Structure) -> Result<MatrixBudget> {
    match rank {
        0 => Err(Error::range("rank of a compression", "1 or more", rank)),
        rank => Ok(MatrixBudget { rank, rows, structure }),
    }
}
