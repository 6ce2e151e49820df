//! The compressions that a recipe can name.

use serde::{Deserialize, Serialize};

use crate::decompose::{
    BySensitivity, Complement, LineScore, LowRank, LowRankSparse, MatrixBudget, NeuronPruning,
    PerMatrix, SharedBasis, SharedDeltas, SparseOnly, TruncatedSvd, Whitened,
};
use crate::error::{Error, Result};
use crate::model::Structure;
use crate::pipeline::builder::PipelineBuilder;
use crate::stage::{Portion, Size, SizeBudget};

/// In what factors the matrices of merged experts are kept; see [`crate::decompose`]. `rank` is 32
/// and `rows`, the share of dense rows, 0.1 (the paper) unless given; with `structure = "columns"`
/// it is columns that stay dense.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CompressChoice {
    /// Truncated SVD plus the rows it misses most (the paper).
    LowRankSparse {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Which rows stay.
        #[serde(default)]
        score: LineScore,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    },
    /// The same, with the rows of largest `|S ⊙ ∇S|`; needs gradients in the statistics.
    LowRankSensitive {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    },
    /// Truncated SVD.
    Svd {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
    },
    /// Low rank fitted to the outputs on samples, which it needs.
    WhitenedSvd {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
    },
    /// Dense rows, and low rank fitted to the others.
    Complement {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    },
    /// Dense rows only.
    Sparse {
        /// Share of rows, in (0, 1].
        #[serde(default = "tenth")]
        rows: f64,
        /// Which rows stay.
        #[serde(default)]
        score: LineScore,
        /// Rows or columns.
        #[serde(default)]
        structure: Structure,
    },
    /// Whole hidden units of gate, up and down; see [`NeuronPruning`].
    Neurons {
        /// Share of hidden units, in (0, 1].
        keep: f64,
        /// `r` of what stands for the others; 0, unless given, makes experts of a smaller size.
        #[serde(default)]
        rank: usize,
    },
    /// One base for a layer and deltas of low rank; see [`SharedDeltas`].
    SharedBasis {
        /// `r`.
        #[serde(default = "paper_rank")]
        rank: usize,
        /// Whether all deltas share `R`.
        #[serde(default)]
        shared_right: bool,
    },
    /// Low rank of another rank for every matrix, so that a native folder has a given size; see
    /// [`SizeBudget`]. Fitted to the outputs where there are samples.
    Size {
        /// How large: `{ percent = 20 }` or `{ bytes = 1000000 }`.
        size: Size,
        /// Of what.
        #[serde(default)]
        of: Portion,
        /// The least rank of any matrix.
        #[serde(default = "least")]
        least_rank: usize,
    },
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

impl CompressChoice {
    /// `low-rank-sparse` of rank 32 with 10 % of the rows.
    pub(crate) fn paper() -> Self {
        let (score, structure) = (LineScore::default(), Structure::default());
        Self::LowRankSparse { rank: paper_rank(), rows: tenth(), score, structure }
    }

    /// A fifth of the expert bytes: what the paper is left with.
    pub(crate) fn fifth() -> Self {
        Self::Size { size: Size::Percent(20.0), of: Portion::Experts, least_rank: least() }
    }

    pub(crate) fn add_to(self, b: PipelineBuilder) -> Result<PipelineBuilder> {
        let budget = |rank: usize, rows: Option<f64>, structure: Structure| match rank {
            0 => Err(Error::range("rank of a compression", "1 or more", rank)),
            rank => Ok(MatrixBudget { rank, rows, structure }),
        };
        Ok(match self {
            Self::LowRankSparse { rank, rows, score, structure } => {
                let method = LowRankSparse { score, structure, ..LowRankSparse::default() };
                b.compressor(PerMatrix::new(method, budget(rank, Some(rows), structure)?))
            }
            Self::LowRankSensitive { rank, rows, structure } => {
                let method = LowRankSparse { structure, ..LowRankSparse::default() };
                let budget = budget(rank, Some(rows), structure)?;
                b.compressor(BySensitivity { method, budget })
            }
            Self::Svd { rank } => b.compressor(PerMatrix::new(
                TruncatedSvd::default(),
                budget(rank, None, Structure::Rows)?,
            )),
            Self::WhitenedSvd { rank } => b.compressor(PerMatrix::new(
                Whitened::default(),
                budget(rank, None, Structure::Rows)?,
            )),
            Self::Complement { rank, rows, structure } => {
                let method = Complement { structure, ..Complement::default() };
                b.compressor(PerMatrix::new(method, budget(rank, Some(rows), structure)?))
            }
            Self::Sparse { rows, score, structure } => {
                let method = SparseOnly { score, structure };
                b.compressor(PerMatrix::new(
                    method,
                    MatrixBudget { rank: 0, rows: Some(rows), structure },
                ))
            }
            Self::Neurons { keep, rank } => {
                b.compressor(NeuronPruning { keep, rank, how: Complement::default() })
            }
            Self::SharedBasis { rank, shared_right } => {
                let how = SharedBasis { shared_right, ..SharedBasis::default() };
                let MatrixBudget { rank, .. } = budget(rank, None, Structure::Rows)?;
                b.compressor(SharedDeltas { rank, how })
            }
            Self::Size { size, of, least_rank } => b.compressor(PerMatrix::new(
                LowRank::default(),
                SizeBudget { size, of, least_rank },
            )),
        })
    }
}
