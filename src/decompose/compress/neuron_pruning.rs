//! Compression of merged experts by whole hidden units.

use super::layer_inputs::LayerInputs;
use crate::decompose::{Complement, around_neurons, kept_neurons, reduced};
use crate::error::{Locate, Result};
use crate::model::{Expert, Factored, MergedLayer, Role, Structure};
use crate::par;
use crate::stage::{
    Compressed, Compression, Compressor, Context, ExpertStorage, Kept, Moments, RankBudget, Stage,
};

/// What is kept of every merged expert, in hidden units: rows of gate and up and columns of down.
///
/// The units with the largest [`neuron_scores`](crate::decompose::neuron_scores) stay whole, with
/// those of the tokens that visit the expert where there are samples. With `rank` 0 the others are
/// gone: experts of a smaller `d_ff`, which every runtime loads, so that every export saves. Else
/// each projection gets a low rank for the other units, fitted by [`Complement`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NeuronPruning {
    /// Share of the hidden units that stay, in (0, 1], rounded up to whole ones; with `rank` 0 to a
    /// multiple of 8, or all.
    pub keep: f64,
    /// Rank of what stands for the others; 0 for nothing.
    pub rank: usize,
    /// How that is fitted.
    pub how: Complement,
}

impl NeuronPruning {
    /// How many of `d_ff` hidden units stay; see [`keep`](Self::keep).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a share outside (0, 1].
    pub fn count(&self, d_ff: usize) -> Result<usize> {
        /// Runtimes multiply by rows of whole vectors of 16 bytes; transformers refuses others.
        const UNITS: usize = 8;
        let share = RankBudget::rank(self.rank).with_share(d_ff, self.keep)?.rows;
        Ok(if self.rank == 0 { share.next_multiple_of(UNITS).min(d_ff) } else { share })
    }

    /// Expert `e` of its kept hidden units alone.
    fn smaller(
        &self,
        expert: &Expert,
        e: usize,
        inputs: &LayerInputs<'_>,
        cx: &Context,
    ) -> Result<Expert> {
        let hidden = inputs.moments(e, expert, Role::Down, cx)?;
        reduced(&expert.view(), &self.kept(expert, hidden.as_ref())?)
    }

    /// Expert `e` in factors around its kept hidden units.
    fn factors(
        &self,
        expert: &Expert,
        e: usize,
        inputs: &LayerInputs<'_>,
        cx: &Context,
    ) -> Result<Vec<Option<Factored>>> {
        let hidden = inputs.moments(e, expert, Role::Down, cx)?;
        let kept = self.kept(expert, hidden.as_ref())?;
        let read = inputs.moments(e, expert, Role::Up, cx)?;
        let moments = (read.as_ref(), hidden.as_ref());
        let parts = around_neurons(&expert.view(), &kept, self.rank, moments, &self.how, cx)?;
        Ok(parts.into_iter().map(|(_, factored)| Some(factored)).collect())
    }

    fn kept(&self, expert: &Expert, hidden: Option<&Moments>) -> Result<Vec<u32>> {
        let view = expert.view();
        kept_neurons(&view, hidden, self.count(view.d_ff())?)
    }
}

impl Stage for NeuronPruning {
    fn name(&self) -> &str {
        "neurons"
    }
}

impl Compressor for NeuronPruning {
    fn compress(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed> {
        let inputs = LayerInputs::of(layer, task, cx)?;
        let (experts, inner) = (&layer.experts, cx.per_task());
        if self.rank == 0 {
            let smaller = par::map(experts.len(), |e| {
                self.smaller(&experts[e], e, &inputs, &inner).in_expert(e)
            })?;
            return Ok(Compressed::dense(smaller));
        }
        let factors = par::map(experts.len(), |e| {
            self.factors(&experts[e], e, &inputs, &inner).in_expert(e)
        })?;
        Compressed::from_factors(layer, factors, cx)
    }

    fn storage(&self, (d_ff, d_model): (usize, usize)) -> Result<ExpertStorage> {
        let budget = RankBudget { rank: self.rank, rows: self.count(d_ff)? };
        budget.check((d_ff, d_model), d_ff)?;
        let of = |structure| Kept::Factors { budget, structure };
        Ok(match self.rank {
            0 => ExpertStorage::HiddenUnits(budget.rows),
            _ => {
                ExpertStorage::Factors { hidden: of(Structure::Rows), down: of(Structure::Columns) }
            }
        })
    }
}
