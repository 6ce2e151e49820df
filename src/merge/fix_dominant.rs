//! Fix-dominant merging: the members' hidden units are added to the dominant expert's.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::units::{Coefficients, Ingredient, Units, down_bias};
use super::weighted::Weighting;
use crate::error::Result;
use crate::linalg::correlation;
use crate::model::Expert;
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// Keeps the dominant expert's hidden units and adds each unit of the other members to the one
/// that it correlates with most; several may go to the same one.
///
/// With `s_a` the units that went to unit `a`, its own included, and expert weights `α` that sum to
/// 1: `w_in,a = Σ_{u ∈ s_a} α_u w_in,u / Σ α_u` (gate and up rows, biases), and the down column is
/// `Σ α_u w_out,u` ([`Coefficients::Exact`]) or the mean, like the rows
/// ([`Coefficients::Reference`]).
///
/// Activations are compared on the tokens routed to any member; weights as vectors of gate row, up
/// row and down column. Cost: `O(K f² t)` or `O(K f² d)`; memory `(f, f)` correlations.
///
/// Source: HC-SMoE (arXiv 2410.08589), `fix-dom-same`. *Deviations:* weights per expert sum to 1
/// over experts where the published code averages over the units of a set, which over-weights a
/// unit that few joined; weights by usage instead of equal ones by default; no token limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FixDominant {
    /// What units are compared by.
    pub ingredient: Ingredient,
    /// What the members count for.
    pub by: Weighting,
    /// The scale of the merged output weights.
    pub coefficients: Coefficients,
}

impl Stage for FixDominant {
    fn name(&self) -> &str {
        match self.ingredient {
            Ingredient::Activations => "fix-dominant",
            Ingredient::Weights => "fix-dominant-weights",
        }
    }

    fn needs(&self) -> Needs {
        match self.ingredient {
            Ingredient::Activations => self.by.needs() | Needs::SAMPLES,
            Ingredient::Weights => self.by.needs(),
        }
    }
}

impl Merger for FixDominant {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        let shares = self.by.shares(members, cx)?;
        let experts: Vec<Expert> =
            (0..members.experts.len()).map(|i| members.aligned(i, cx)).collect::<Result<_>>()?;
        let inputs = match self.ingredient {
            Ingredient::Activations => Some(members.inputs(self.name())?),
            Ingredient::Weights => None,
        };
        let inputs = inputs.as_ref().map(|a| a.view()).filter(|x| x.nrows() > 1);
        let dominant = members.dominant;
        let mut fold = Fold::new(&experts[dominant], shares[dominant])?;
        for (i, expert) in experts.iter().enumerate() {
            if i != dominant {
                let home = matches(&experts[dominant], expert, inputs, cx)?;
                fold.add(expert, shares[i], &home)?;
            }
        }
        fold.finish(self.coefficients).into_expert(down_bias(&experts, &shares))
    }
}

/// For every hidden unit of `other`, the unit of `dominant` that it correlates with most; the
/// smallest of equals.
fn matches(
    dominant: &Expert,
    other: &Expert,
    inputs: Option<ArrayView2<'_, f32>>,
    cx: &Context,
) -> Result<Vec<usize>> {
    let compute = cx.compute();
    let corr = match inputs {
        Some(x) => {
            let hidden = |e: &Expert| e.view().hidden(x, compute);
            correlation(hidden(dominant)?.view(), hidden(other)?.view(), compute)?
        }
        None => {
            let units = |e: &Expert| Units::of(std::slice::from_ref(e));
            let (a, b) = (units(dominant)?, units(other)?);
            correlation(a.weights().t(), b.weights().t(), compute)?
        }
    };
    let best = |column: ndarray::ArrayView1<'_, f32>| {
        let first = |best: usize, (a, &c): (usize, &f32)| if c > column[best] { a } else { best };
        column.iter().enumerate().fold(0, first)
    };
    Ok(corr.axis_iter(Axis(1)).map(best).collect())
}

/// Weighted sums of units, one per unit of the dominant expert.
struct Fold {
    dominant: Units,
    sum: Array2<f64>,
    weight: Vec<f64>,
}

impl Fold {
    fn new(dominant: &Expert, share: f64) -> Result<Self> {
        let dominant = Units::of(std::slice::from_ref(dominant))?;
        let sum = dominant.rows.mapv(|w| share * f64::from(w));
        let weight = vec![share; sum.nrows()];
        Ok(Self { dominant, sum, weight })
    }

    fn add(&mut self, expert: &Expert, share: f64, home: &[usize]) -> Result<()> {
        let units = Units::of(std::slice::from_ref(expert))?;
        for (row, &a) in units.rows.rows().into_iter().zip(home) {
            self.sum.row_mut(a).zip_mut_with(&row, |s, &w| *s += share * f64::from(w));
            self.weight[a] += share;
        }
        Ok(())
    }

    /// Means, with the output scaled back to sums for exact coefficients. A unit without weight
    /// keeps the dominant's input weights: its output is 0 or its own.
    fn finish(self, coefficients: Coefficients) -> Units {
        let Self { dominant, sum, weight } = self;
        let mut rows = dominant.rows.clone();
        for ((mut row, sum), &w) in rows.rows_mut().into_iter().zip(sum.rows()).zip(&weight) {
            if w > 0.0 {
                row.zip_mut_with(&sum, |out, &s| *out = (s / w) as f32);
            }
        }
        let mut units = dominant.with_rows(rows);
        if coefficients == Coefficients::Exact {
            weight.iter().enumerate().for_each(|(a, &w)| units.scale_output(a, w as f32));
        }
        units
    }
}
