//! Compression of every matrix by itself, with the rows or columns kept that matter to the loss.

use super::budget::MatrixBudget;
use super::per_matrix::{Matrix, each_matrix, same_of_all};
use crate::decompose::LowRankSparse;
use crate::error::{Error, Result};
use crate::model::{MergedLayer, RoutingStats};
use crate::stage::{
    Compressed, Compression, Compressor, Context, ExpertStorage, Needs, RankBudget, Stage,
};

/// Every matrix of every merged expert by [`LowRankSparse::by_sensitivity`], with the gradients in
/// the statistics, added up over the members of a group in their common order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BySensitivity {
    /// The low rank, and whether rows or columns are kept.
    pub method: LowRankSparse,
    /// What is kept of each matrix.
    pub budget: MatrixBudget,
}

impl Stage for BySensitivity {
    fn name(&self) -> &str {
        "low-rank-sensitive"
    }

    fn needs(&self) -> Needs {
        Needs::GRADIENTS
    }
}

impl Compressor for BySensitivity {
    fn compress(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed> {
        let gradients = RoutingStats::need(&task.gradients, self.name(), "gradients")?;
        let decompose = |matrix: &Matrix<'_>, budget: &RankBudget, cx: &Context| {
            let dim = matrix.weight.dim();
            let expert = gradients.get(matrix.expert);
            let gradient = expert.and_then(|g| g.view().linear(matrix.role)).map(|g| g.weight);
            let missing = || Error::shape("gradients", dim, "others");
            let gradient = gradient.filter(|g| g.dim() == dim).ok_or_else(missing)?;
            self.method.by_sensitivity(matrix.weight, gradient, budget, cx)
        };
        each_matrix(layer, &same_of_all(layer, &self.budget)?, &decompose, cx)
    }

    fn storage(&self, up: (usize, usize)) -> Result<ExpertStorage> {
        self.budget.storage(up)
    }

    fn uses_inputs(&self) -> bool {
        false
    }
}
