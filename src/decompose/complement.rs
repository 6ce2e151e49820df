//! Dense rows, and low rank for the others: the best split of a budget between the two.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::score::{RowScore, others, squares, top};
use super::{LowRankSparse, Whitening, check};
use crate::error::{Error, Result};
use crate::linalg::SvdMethod;
use crate::model::{Factored, Structure};
use crate::stage::{Context, Decomposer, Moments, RankBudget, Stage};

/// Keeps `k` rows of `W` dense and fits the low rank to the others:
/// `min over |K| = k, rank r of ‖(W − L R) S‖²` on the rows outside `K`, with `S Sᵀ` the inputs'
/// damped second moment, or the identity without moments.
///
/// In the paper the kept rows are those of `W − L R` with `L R` fitted to all of `W`, so that the
/// low rank spends itself on rows that are exact anyway. Here `K` and the fit take turns: `K` is
/// the `k` rows that the subspace represents worst, the fit is the truncated SVD of the rest.
/// Each half lowers the loss, so it stops when `K` is stable, or after `rounds`. The loss is at
/// most that of [`LowRankSparse`], by either score, with the same rank and number of rows: the
/// rows which that would keep are tried as a start (up to the tolerance of the SVD method).
///
/// `L` has zeros in the kept rows (`R` in the kept columns); they are counted as parameters though
/// a format may leave them out. The rank is at most that of the remaining rows. Cost: one
/// truncated SVD a round, twice with moments; columns also take a Cholesky factorisation a round.
/// Source: this crate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Complement {
    /// Rows or columns.
    pub structure: Structure,
    /// How often the kept rows may change.
    pub rounds: usize,
    /// `ε`: the damping of the moments, as a share of their mean diagonal entry.
    pub damping: f64,
    /// How the singular vectors are found.
    pub svd: SvdMethod,
}

impl Default for Complement {
    /// Rows, five rounds, a damping of 1e-6.
    fn default() -> Self {
        Self { structure: Structure::Rows, rounds: 5, damping: 1e-6, svd: SvdMethod::Auto }
    }
}

/// A fit outside the kept rows, and its loss.
struct Fit {
    kept: Vec<u32>,
    /// `(rows left, r)`, or `(m, r)` by columns.
    left: Array2<f32>,
    /// `(r, n)`, or `(r, rows left)` by columns; not whitened.
    right: Array2<f32>,
    loss: f64,
}

/// What the rounds share.
struct Problem<'a> {
    weight: ArrayView2<'a, f32>,
    moments: Option<&'a Moments>,
    /// By rows, where the metric is the same for all of them.
    whitening: Option<Whitening>,
    budget: RankBudget,
    how: &'a Complement,
    cx: &'a Context,
}

impl Problem<'_> {
    fn fit(&self, kept: Vec<u32>) -> Result<Fit> {
        let (cx, by) = (self.cx, self.how.structure);
        let rest = others(&kept, by.count(self.weight.dim()));
        let part = self.weight.select(by.axis(), &rest);
        let own;
        let whitening = match (by, self.moments) {
            (Structure::Columns, Some(moments)) => {
                let mean = moments.mean().select(ndarray::Axis(0), &rest);
                own = Whitening::of(mean.select(ndarray::Axis(1), &rest), self.how.damping, cx)?;
                Some(&own)
            }
            _ => self.whitening.as_ref(),
        };
        let white = match whitening {
            Some(whitening) => whitening.apply(part.view(), cx)?,
            None => part,
        };
        let rank = self.budget.rank.min(white.nrows()).min(white.ncols());
        let svd = cx.truncated_svd(white.view(), rank, self.how.svd)?;
        let total: f64 = squares(white.view(), Structure::Rows).iter().sum();
        let captured: f64 = svd.s.iter().map(|&s| f64::from(s).powi(2)).sum();
        let (left, right) = svd.into_balanced();
        let right = match whitening {
            Some(whitening) => whitening.undo(right.view(), cx)?,
            None => right,
        };
        Ok(Fit { kept, left, right, loss: (total - captured).max(0.0) })
    }

    /// The `k` rows of all of `W` that the fitted subspace represents worst.
    fn worst(&self, fit: &Fit) -> Result<Vec<u32>> {
        let residual = match self.how.structure {
            Structure::Rows => self.off_rows(fit)?,
            Structure::Columns => self.off_columns(fit)?,
        };
        Ok(top(&residual, self.budget.rows))
    }

    /// `‖w S − proj(w S)‖²` of every row, on the span of the whitened `R`.
    fn off_rows(&self, fit: &Fit) -> Result<Vec<f64>> {
        let (white, right) = match &self.whitening {
            None => (self.weight.to_owned(), fit.right.clone()),
            Some(w) => (w.apply(self.weight, self.cx)?, w.apply(fit.right.view(), self.cx)?),
        };
        off_span(white.view(), right.view(), self.cx)
    }

    /// `‖w − proj(w)‖² C_aa` of every column, on the span of `L`.
    fn off_columns(&self, fit: &Fit) -> Result<Vec<f64>> {
        let mut off = off_span(self.weight.t(), fit.left.t(), self.cx)?;
        if let Some(moments) = self.moments {
            off.iter_mut().zip(moments.rms()).for_each(|(o, rms)| *o *= rms * rms);
        }
        Ok(off)
    }

    /// Rounds from a start, as long as the loss falls.
    fn descend(&self, start: Vec<u32>) -> Result<Fit> {
        let mut best = self.fit(start)?;
        for _ in 0..self.how.rounds {
            let kept = self.worst(&best)?;
            if kept == best.kept {
                break;
            }
            let next = self.fit(kept)?;
            if next.loss >= best.loss {
                break;
            }
            best = next;
        }
        Ok(best)
    }

    /// The rows that [`LowRankSparse`] would keep.
    fn reference(&self, score: RowScore) -> Result<Vec<u32>> {
        let Complement { structure, svd, .. } = *self.how;
        let reference = LowRankSparse { structure, score, svd };
        let kept = reference.decompose(self.weight, self.moments, &self.budget, self.cx)?;
        Ok(kept.indices().to_vec())
    }
}

impl Complement {
    /// The fit around rows that were chosen elsewhere, ascending.
    ///
    /// # Errors
    /// As [`Decomposer::decompose`]; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for
    /// indices that do not ascend or are beyond the matrix.
    pub fn around(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        kept: Vec<u32>,
        rank: usize,
        cx: &Context,
    ) -> Result<Factored> {
        let count = self.structure.count(weight.dim());
        let ascending = kept.windows(2).all(|w| w[0] < w[1]);
        if !ascending || kept.last().is_some_and(|&last| last as usize >= count) {
            let expected = format!("ascending numbers below {count}");
            return Err(Error::range("kept rows or columns", expected, format!("{kept:?}")));
        }
        let budget = RankBudget { rank, rows: kept.len() };
        let fit = self.problem(weight, moments, &budget, cx)?.fit(kept)?;
        assemble(weight, self.structure, fit)
    }

    fn problem<'a>(
        &'a self,
        weight: ArrayView2<'a, f32>,
        moments: Option<&'a Moments>,
        budget: &RankBudget,
        cx: &'a Context,
    ) -> Result<Problem<'a>> {
        check(weight, moments, budget, self.structure)?;
        let whitening = match (self.structure, moments) {
            (Structure::Rows, Some(moments)) => Some(Whitening::new(moments, self.damping, cx)?),
            _ => None,
        };
        Ok(Problem { weight, moments, whitening, budget: *budget, how: self, cx })
    }
}

/// Squared distance of every row of `A: (p, q)` from the span of the rows of `B: (r, q)`.
fn off_span(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, cx: &Context) -> Result<Vec<f64>> {
    let mut off = squares(a, Structure::Rows);
    let span = cx.backend().qr(b.t())?.q;
    let mut inside = Array2::zeros((a.nrows(), span.ncols()));
    cx.compute().gemm(1.0, a, span.view(), 0.0, inside.view_mut())?;
    for (off, inside) in off.iter_mut().zip(squares(inside.view(), Structure::Rows)) {
        *off = (*off - inside).max(0.0);
    }
    Ok(off)
}

impl Stage for Complement {
    fn name(&self) -> &str {
        "complement"
    }
}

impl Decomposer for Complement {
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored> {
        let problem = self.problem(weight, moments, budget, cx)?;
        let mut best = problem.descend(problem.reference(RowScore::Energy)?)?;
        // In the plain metric the rows of largest energy are the best for the reference's fit, so
        // that its choice by magnitude cannot do better than the start above.
        if moments.is_some() && budget.rows > 0 {
            let other = problem.descend(problem.reference(RowScore::Magnitude)?)?;
            if other.loss < best.loss {
                best = other;
            }
        }
        assemble(weight, self.structure, best)
    }
}

/// Puts the fit back among the kept rows of `W`.
fn assemble(weight: ArrayView2<'_, f32>, by: Structure, fit: Fit) -> Result<Factored> {
    let (m, n) = weight.dim();
    let rest = others(&fit.kept, by.count((m, n)));
    let exact = by.pick(weight, &fit.kept);
    let rank = fit.left.ncols();
    let (left, right) = match by {
        Structure::Rows => (spread(&fit.left, by, &rest, (m, rank)), fit.right),
        Structure::Columns => (fit.left, spread(&fit.right, by, &rest, (rank, n))),
    };
    Factored::new(left, right, by, fit.kept, exact)
}

/// Zeros of a shape, with the rows of `part` at `places`.
fn spread(
    part: &Array2<f32>,
    by: Structure,
    places: &[usize],
    shape: (usize, usize),
) -> Array2<f32> {
    let mut out = Array2::zeros(shape);
    for (&i, row) in places.iter().zip(part.axis_iter(by.axis())) {
        out.index_axis_mut(by.axis(), i).assign(&row);
    }
    out
}
