//! How a merged layer is compressed, and what a folder holds of it afterwards; the work itself is
//! in [`compress`](super::compress).

use std::collections::BTreeMap;

use super::matrix_budget::{CompressionBudget, MatrixBudget};
use super::neurons::Neurons;
use super::shared_deltas::SharedDeltas;
use crate::checkpoint::Factoring;
use crate::decompose::LowRankSparse;
use crate::error::{Error, Result};
use crate::model::LayerId;
use crate::stage::{Decomposer, Kept, Needs};

/// How a merged layer is compressed.
#[derive(Debug)]
pub(super) enum Compressor {
    /// Matrix by matrix.
    Each {
        /// How.
        decomposer: Box<dyn Decomposer>,
        /// To what.
        budget: CompressionBudget,
    },
    /// Matrix by matrix, the lines kept that matter most to the loss.
    Sensitive {
        /// How.
        method: LowRankSparse,
        /// To what.
        budget: MatrixBudget,
    },
    /// By whole hidden units.
    Neurons(Neurons),
    /// Around one base for all experts.
    Shared(SharedDeltas),
}

/// What a size budget leaves of every matrix, layer by layer.
pub(super) type Ranks = BTreeMap<LayerId, Factoring>;

impl Compressor {
    /// Fails when a layer's matrices cannot be kept to the budget; reads no weight.
    pub(super) fn check(&self, (d_ff, d_model): (usize, usize)) -> Result<()> {
        match self {
            Self::Each { budget: CompressionBudget::Matrix(budget), .. }
            | Self::Sensitive { budget, .. } => {
                budget.of((d_ff, d_model))?;
                budget.of((d_model, d_ff)).map(drop)
            }
            Self::Each { budget: CompressionBudget::Size(budget), .. } => budget.check(),
            Self::Neurons(neurons) => neurons.check((d_ff, d_model)),
            Self::Shared(shared) => shared.check((d_ff, d_model)),
        }
    }

    /// What is stored of the matrices of `groups` merged experts, `gated` or not; `ranks` are those
    /// of a size budget. `None` when they are stored as they are multiplied out.
    pub(super) fn factoring(
        &self,
        id: LayerId,
        groups: usize,
        gated: bool,
        (d_ff, d_model): (usize, usize),
        ranks: Option<&Ranks>,
    ) -> Result<Option<Factoring>> {
        let same = |hidden: Kept, down: Kept| {
            let mut expert = vec![hidden; 1 + usize::from(gated)];
            expert.push(down);
            Some(Factoring::new(vec![expert; groups]))
        };
        match self {
            Self::Each { budget: CompressionBudget::Matrix(budget), .. }
            | Self::Sensitive { budget, .. } => {
                let structure = budget.structure;
                let of = |dim| Ok::<_, Error>(Kept::Factors { budget: budget.of(dim)?, structure });
                Ok(same(of((d_ff, d_model))?, of((d_model, d_ff))?))
            }
            Self::Each { budget: CompressionBudget::Size(_), .. } => {
                let planned = ranks.and_then(|ranks| ranks.get(&id)).cloned();
                planned.ok_or_else(|| Error::range("layer", "one with planned ranks", id)).map(Some)
            }
            Self::Neurons(neurons) => {
                Ok(neurons.kept(d_ff)?.and_then(|(hidden, down)| same(hidden, down)))
            }
            Self::Shared(_) => Ok(None),
        }
    }

    /// The hidden units that are left of `d_ff`, when there is nothing else left.
    pub(super) fn reduced(&self, d_ff: usize) -> Result<Option<usize>> {
        match self {
            Self::Neurons(neurons) if neurons.rank == 0 => neurons.count(d_ff).map(Some),
            _ => Ok(None),
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Each { decomposer, .. } => decomposer.name(),
            Self::Sensitive { .. } => "low-rank-sensitive",
            Self::Neurons(_) => "neurons",
            Self::Shared(_) => "shared-basis",
        }
    }

    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::Each { decomposer, .. } => decomposer.needs(),
            Self::Sensitive { .. } => Needs::GRADIENTS,
            Self::Neurons(_) | Self::Shared(_) => Needs::NONE,
        }
    }

    /// Whether samples make a difference.
    pub(super) fn uses_moments(&self) -> bool {
        match self {
            Self::Each { decomposer, .. } => decomposer.uses_moments(),
            Self::Sensitive { .. } => false,
            Self::Neurons(_) | Self::Shared(_) => true,
        }
    }
}
