//! Compression of merged experts by whole hidden units.

use super::compress::{Ranked, Tokens, describe, with_weights};
use super::report::CompressionReport;
use crate::decompose::analysis::stable_rank;
use crate::decompose::{Complement, around_neurons, kept_neurons, reduced};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Factored, MergedLayer, Role, Structure};
use crate::par;
use crate::stage::{Context, Kept, RankBudget};

/// What is kept of every merged expert, in hidden units: rows of gate and up and columns of down.
///
/// The units with the largest [`neuron_scores`](crate::decompose::neuron_scores) stay whole, with
/// those of the tokens that visit the expert where there are samples. With `rank` 0 the others are
/// gone: experts of a smaller `d_ff`, which every runtime loads, so that every export saves. Else
/// each projection gets a low rank for the other units, fitted by [`Complement`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neurons {
    /// Share of the hidden units that stay, in (0, 1], rounded up to whole ones; with `rank` 0 to a
    /// multiple of 8, or all.
    pub keep: f64,
    /// Rank of what stands for the others; 0 for nothing.
    pub rank: usize,
    /// How that is fitted.
    pub how: Complement,
}

/// A merged expert as it will be.
struct Done {
    expert: Expert,
    factors: Vec<Option<Factored>>,
    ranks: Vec<Ranked>,
}

impl Neurons {
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

    pub(super) fn check(&self, (d_ff, d_model): (usize, usize)) -> Result<()> {
        let budget = RankBudget { rank: self.rank, rows: self.count(d_ff)? };
        budget.check((d_ff, d_model), d_ff)
    }

    /// What is stored of gate and up, and of down; `None` when nothing is in factors.
    pub(super) fn kept(&self, d_ff: usize) -> Result<Option<(Kept, Kept)>> {
        let budget = RankBudget { rank: self.rank, rows: self.count(d_ff)? };
        let of = |structure| Kept::Factors { budget, structure };
        Ok((self.rank > 0).then(|| (of(Structure::Rows), of(Structure::Columns))))
    }

    pub(super) fn compress(
        &self,
        mut layer: MergedLayer,
        original: &[f64],
        tokens: &Tokens<'_>,
        cx: &Context,
    ) -> Result<(MergedLayer, CompressionReport)> {
        let inner = cx.per_task();
        let done = par::map(layer.experts.len(), |e| {
            self.one(e, &layer.experts[e], tokens, &inner).in_expert(e)
        })?;
        let told: Vec<Ranked> = done.iter().flat_map(|d| d.ranks.iter().copied()).collect();
        let mut report = describe(&layer, original, &told);
        let (experts, factors): (Vec<_>, Vec<_>) =
            done.into_iter().map(|d| (d.expert, d.factors)).unzip();
        if self.rank == 0 {
            // Biases of the units that are gone are gone too.
            report.parameters.after = experts.iter().map(|e| e.parameters() as u64).sum();
        } else {
            layer.factors = Some(factors);
        }
        layer.experts = experts;
        Ok((layer, report))
    }

    fn one(&self, e: usize, expert: &Expert, tokens: &Tokens<'_>, cx: &Context) -> Result<Done> {
        let view = expert.view();
        let hidden = tokens.moments(e, expert, Role::Down, cx)?;
        let kept = kept_neurons(&view, hidden.as_ref(), self.count(view.d_ff())?)?;
        let (small, factors) = if self.rank == 0 {
            (reduced(&view, &kept)?, Vec::new())
        } else {
            let inputs = tokens.moments(e, expert, Role::Up, cx)?;
            let moments = (inputs.as_ref(), hidden.as_ref());
            let parts = around_neurons(&view, &kept, self.rank, moments, &self.how, cx)?;
            let dense = parts.iter().map(|(_, factored)| factored.to_dense(cx.compute()).map(Some));
            let dense = dense.collect::<Result<Vec<_>>>()?;
            let small = with_weights(expert.clone(), &mut dense.into_iter())?;
            (small, parts.into_iter().map(|(_, factored)| Some(factored)).collect())
        };
        let ranks = ranks(expert, &small, &factors, cx)?;
        Ok(Done { expert: small, factors, ranks })
    }
}

fn ranks(
    before: &Expert,
    after: &Expert,
    factors: &[Option<Factored>],
    cx: &Context,
) -> Result<Vec<Ranked>> {
    let (before, after) = (before.view(), after.view());
    let of_one = |(at, (role, linear)): (usize, (Role, crate::model::LinearView<'_>))| {
        let missing = || Error::shape("expert", format!("a {role} projection"), "none");
        let small = after.linear(role).ok_or_else(missing)?.weight;
        let factored = factors.get(at).and_then(Option::as_ref);
        Ok(Ranked {
            dense: linear.weight.len(),
            parameters: factored.map_or(small.len(), Factored::parameters),
            merged: stable_rank(linear.weight, cx)?,
            compressed: stable_rank(small, cx)?,
        })
    };
    before.linears().enumerate().map(of_one).collect()
}
