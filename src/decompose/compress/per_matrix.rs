//! Compression of every matrix of every merged expert by itself.

use ndarray::ArrayView2;

use super::budget::{CompressionBudget, MatrixBudget};
use super::layer_inputs::{LayerInputs, by_expert, matrices, matrix};
use super::survey::survey;
use crate::error::{Error, Locate, Result};
use crate::model::{Factored, MergedLayer, Role, Structure};
use crate::par;
use crate::stage::{
    Compressed, Compression, Compressor, Context, Decomposer, ExpertStorage, Kept, Needs,
    RankBudget, SizeBudget, Spectrum, Stage,
};

/// Every matrix of every merged expert, those of experts that stayed alone too, as `L R + S` by a
/// [`Decomposer`]; biases are kept.
///
/// Methods that weigh errors by second moments get those of the samples that visit the expert: the
/// inputs themselves for gate and up, the merged expert's hidden activations for down. An expert
/// that none of them visits gets those of all.
///
/// # Memory
/// The factors and their products beside the layer; with moments `8 n²` bytes and the hidden
/// activations of an expert's tokens for every thread.
#[derive(Debug)]
pub struct PerMatrix {
    decomposer: Box<dyn Decomposer>,
    budget: CompressionBudget,
}

impl PerMatrix {
    /// What is kept of each matrix: the same of all ([`MatrixBudget`]), or as much as pays most for
    /// all of them together ([`SizeBudget`]).
    pub fn new(
        decomposer: impl Decomposer + 'static,
        budget: impl Into<CompressionBudget>,
    ) -> Self {
        Self { decomposer: Box::new(decomposer), budget: budget.into() }
    }
}

impl Stage for PerMatrix {
    fn name(&self) -> &str {
        self.decomposer.name()
    }

    fn needs(&self) -> Needs {
        self.decomposer.needs()
    }
}

impl Compressor for PerMatrix {
    fn compress(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed> {
        let inputs = LayerInputs::of(layer, task, cx)?;
        let decompose = |matrix: &Matrix<'_>, budget: &RankBudget, cx: &Context| {
            let expert = &layer.experts[matrix.expert];
            let moments = inputs.moments(matrix.expert, expert, matrix.role, cx)?;
            self.decomposer.decompose(matrix.weight, moments.as_ref(), budget, cx)
        };
        let kept = match &self.budget {
            CompressionBudget::Matrix(budget) => same_of_all(layer, budget)?,
            CompressionBudget::Size(_) => allocated(layer, task)?,
        };
        each_matrix(layer, &kept, &decompose, cx)
    }

    fn storage(&self, up: (usize, usize)) -> Result<ExpertStorage> {
        match &self.budget {
            CompressionBudget::Matrix(budget) => budget.storage(up),
            CompressionBudget::Size(budget) => {
                budget.check()?;
                Ok(ExpertStorage::Allocated)
            }
        }
    }

    fn uses_inputs(&self) -> bool {
        self.decomposer.uses_moments()
    }

    fn size_budget(&self) -> Option<&SizeBudget> {
        match &self.budget {
            CompressionBudget::Matrix(_) => None,
            CompressionBudget::Size(budget) => Some(budget),
        }
    }

    fn survey(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Vec<Vec<Spectrum>>> {
        survey(layer, task, cx)
    }
}

/// One matrix of a layer.
pub(super) struct Matrix<'a> {
    pub(super) expert: usize,
    pub(super) role: Role,
    pub(super) weight: ArrayView2<'a, f32>,
}

/// How a matrix is decomposed within a budget.
pub(super) type DecomposeMatrix<'a> =
    dyn Fn(&Matrix<'_>, &RankBudget, &Context) -> Result<Factored> + Sync + 'a;

/// The layer with every matrix decomposed within what `kept` says of it, in parallel.
pub(super) fn each_matrix(
    layer: &MergedLayer,
    kept: &[Vec<Kept>],
    decompose: &DecomposeMatrix<'_>,
    cx: &Context,
) -> Result<Compressed> {
    let jobs = matrices(&layer.experts);
    let roles = jobs.len() / layer.experts.len();
    let inner = cx.per_task();
    let factors = par::map(jobs.len(), |i| {
        let (expert, role) = jobs[i];
        let missing = || Error::shape("allocated matrices", jobs.len(), i);
        let kept = kept.get(expert).and_then(|kept| kept.get(i % roles));
        let of_one = || match kept.ok_or_else(missing)? {
            Kept::Dense => Ok(None),
            Kept::Factors { budget, .. } => {
                let weight = matrix(layer.experts[expert].view(), role);
                decompose(&Matrix { expert, role, weight }, budget, &inner).map(Some)
            }
        };
        of_one().in_expert(expert)
    })?;
    Compressed::from_factors(layer, by_expert(factors, layer.experts.len()), cx)
}

/// What is kept of all matrices of a layer under one budget for each.
pub(super) fn same_of_all(layer: &MergedLayer, budget: &MatrixBudget) -> Result<Vec<Vec<Kept>>> {
    let one = layer.experts[0].view();
    let expert = budget.storage(one.up.weight.dim())?.matrices(one.gate.is_some());
    Ok(vec![expert.unwrap_or_default(); layer.experts.len()])
}

/// What a size budget has left of the matrices of a layer.
fn allocated(layer: &MergedLayer, task: &Compression<'_>) -> Result<Vec<Vec<Kept>>> {
    let missing = || Error::range("layer", "one with allocated ranks", layer.id);
    task.allocated.map(<[_]>::to_vec).ok_or_else(missing)
}

impl MatrixBudget {
    /// Factors within this budget for all matrices of an expert whose up matrix is `(d_ff,
    /// d_model)`.
    pub(super) fn storage(&self, (d_ff, d_model): (usize, usize)) -> Result<ExpertStorage> {
        let structure: Structure = self.structure;
        let of = |dim| Ok::<_, Error>(Kept::Factors { budget: self.of(dim)?, structure });
        Ok(ExpertStorage::Factors { hidden: of((d_ff, d_model))?, down: of((d_model, d_ff))? })
    }
}
