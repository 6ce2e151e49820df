//! A target size over all layers, and the spectrum of each matrix, by which it is shared out.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How large.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    /// Bytes of tensors.
    Bytes(u64),
    /// Percent of what it is in the source, above 0 and at most 100.
    Percent(f64),
}

/// Of what a size is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Portion {
    /// The routed experts of all MoE layers, protected ones included.
    #[default]
    Experts,
    /// All tensors of the model.
    Model,
}

/// A target size of a native folder. The ranks of all matrices are chosen so that it is met from
/// below, to less than what one more rank takes: within 1 % unless the model is tiny, or whole when
/// the merged experts fit without compression.
///
/// The next rank goes to the matrix where `w σ_{r+1}² / (m + n)` of its [`Spectrum`] is largest
/// ([`allocate`](crate::decompose::ranks::allocate)). A matrix whose next rank would not pay for
/// itself stays dense.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SizeBudget {
    /// How large.
    pub size: Size,
    /// Of what.
    #[serde(default)]
    pub of: Portion,
    /// The least rank of any matrix.
    #[serde(default = "one")]
    pub least_rank: usize,
}

fn one() -> usize {
    1
}

impl SizeBudget {
    /// A share of the source's expert bytes.
    pub fn percent(percent: f64) -> Self {
        Self { size: Size::Percent(percent), of: Portion::Experts, least_rank: 1 }
    }

    /// Refuses sizes that are none.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for 0 bytes, a share outside
    /// (0, 100], or a least rank of 0.
    pub fn check(&self) -> Result<()> {
        match self.size {
            Size::Bytes(0) => {
                return Err(Error::range("size of a compression", "1 byte or more", 0));
            }
            Size::Percent(p) if !(p > 0.0 && p <= 100.0) => {
                return Err(Error::range("percent of a size", "a number in (0, 100]", p));
            }
            _ => {}
        }
        match self.least_rank {
            0 => Err(Error::range("least rank", "1 or more", 0)),
            _ => Ok(()),
        }
    }

    /// The target in bytes, of which `source` is the size in the source.
    pub fn bytes(&self, source: u64) -> u64 {
        match self.size {
            Size::Bytes(bytes) => bytes,
            Size::Percent(percent) => (percent / 100.0 * source as f64) as u64,
        }
    }
}

/// What a matrix has to offer a size budget: its singular values, and what an error in it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// `(m, n)`.
    pub shape: (usize, usize),
    /// All `min(m, n)` singular values of `W`, or of `W S` when it is whitened; largest first.
    pub sigma: Vec<f64>,
    /// How much an error counts: the expert's usage, or its mass of squared router weights.
    pub weight: f64,
    /// What one number costs, in the unit of the budget: 1 where that is in parameters, the size
    /// of the data type where it is in bytes.
    pub unit: usize,
}
