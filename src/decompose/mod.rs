//! A merged expert's matrices in factors, `W ≈ L R + S`: low rank plus a few dense rows or columns.
//! One method a file.
//!
//! | decomposer | low rank fitted to | kept | moments |
//! |---|---|---|---|
//! | [`TruncatedSvd`] | `W` | nothing | unused |
//! | [`Whitened`] | `W`, error weighed by the inputs | nothing | required |
//! | [`LowRank`] | `W`, error weighed by the inputs if known | nothing | optional |
//! | [`LowRankSparse`] | all of `W` (the paper) | rows or columns of `W − L R` | score only |
//! | [`Complement`] | the rows that are not kept | rows or columns of `W` | optional |
//! | [`SparseOnly`] | – | rows or columns of `W` | score only |
//!
//! What is said of kept rows holds for kept columns where the structure is by columns.
//!
//! [`ranks`] chooses ranks: by ratio, by kept energy, or for all matrices of a model within one
//! budget. [`platon`] is the paper's importance, smoothed over training steps, with its schedule.

pub mod analysis;
mod complement;
mod compress;
mod low_rank;
mod low_rank_sparse;
mod neurons;
pub mod platon;
pub mod ranks;
mod score;
mod shared;
mod sparse_only;
mod truncated_svd;
mod whitened;
mod whitening;

pub use complement::Complement;
pub use compress::{
    BySensitivity, CompressionBudget, MatrixBudget, NeuronPruning, PerMatrix, SharedDeltas,
    allocate_bytes,
};
pub use low_rank::LowRank;
pub use low_rank_sparse::LowRankSparse;
pub use neurons::{around_neurons, kept_neurons, neuron_scores, reduced};
pub use score::RowScore;
pub use shared::{BaseAndDeltas, SharedBasis};
pub use sparse_only::SparseOnly;
pub use truncated_svd::TruncatedSvd;
pub use whitened::Whitened;
pub use whitening::Whitening;

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::model::{Factored, Finite, Structure};
use crate::par;
use crate::stage::{Context, Decomposer, Moments, RankBudget};

/// One matrix of many to decompose.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// `W: (m, n)`.
    pub weight: ArrayView2<'a, f32>,
    /// Those of its inputs.
    pub moments: Option<&'a Moments>,
    /// What is kept of it.
    pub budget: RankBudget,
}

/// Decomposes matrices in parallel, one a task and each on one thread; results are in order.
///
/// # Errors
/// That of the first job that fails.
pub fn decompose_all(
    decomposer: &dyn Decomposer,
    jobs: &[Job<'_>],
    cx: &Context,
) -> Result<Vec<Factored>> {
    par::map(jobs.len(), |i| {
        let Job { weight, moments, budget } = jobs[i];
        decomposer.decompose(weight, moments, &budget, &cx.per_task())
    })
}

/// What every decomposer refuses.
fn check(
    weight: ArrayView2<'_, f32>,
    moments: Option<&Moments>,
    budget: &RankBudget,
    structure: Structure,
) -> Result<()> {
    weight.check_finite("matrix to decompose")?;
    if let Some(moments) = moments {
        moments.check_width(weight.ncols())?;
    }
    budget.check(weight.dim(), structure.count(weight.dim()))
}

/// Methods without a sparse part refuse a budget for one.
fn no_kept_rows(method: &str, budget: &RankBudget) -> Result<()> {
    match budget.rows {
        0 => Ok(()),
        rows => Err(Error::range(format!("kept rows of {method}, which keeps none"), 0, rows)),
    }
}
