//! A merged expert's matrices in factors, `W ≈ L R + S`: low rank plus a few dense rows or columns.
//! One method a file.
//!
//! | decomposer | low rank fitted to | kept | moments |
//! |---|---|---|---|
//! | [`TruncatedSvd`] | `W` | nothing | unused |
//! | [`Whitened`] | `W`, error weighed by the inputs | nothing | required |
//! | [`LowRankSparse`] | all of `W` (the paper) | rows or columns of `W − L R` | score only |
//! | [`Complement`] | the lines that are not kept | rows or columns of `W` | optional |
//! | [`SparseOnly`] | – | rows or columns of `W` | score only |
//!
//! `ranks` chooses ranks: by ratio, by kept energy, or for all matrices of a model within one
//! budget. [`platon`] is the paper's importance, smoothed over training steps, with its schedule.

mod complement;
mod low_rank_sparse;
pub mod platon;
mod score;
mod sparse_only;
mod truncated_svd;
mod whitened;
mod whitening;

pub use complement::Complement;
pub use low_rank_sparse::LowRankSparse;
pub use score::LineScore;
pub use sparse_only::SparseOnly;
pub use truncated_svd::TruncatedSvd;
pub use whitened::Whitened;
pub use whitening::Whitening;

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::model::{Finite, Structure};
use crate::stage::{Moments, RankBudget};

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
    budget.check(weight.dim(), structure.lines(weight.dim()))
}

/// Methods without a sparse part refuse a budget for one.
fn no_lines(method: &str, budget: &RankBudget) -> Result<()> {
    match budget.rows {
        0 => Ok(()),
        rows => Err(Error::range(format!("kept rows of {method}, which keeps none"), 0, rows)),
    }
}
