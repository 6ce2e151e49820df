//! ZipIt: hidden units are paired within and across experts, most alike first.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::units::{Coefficients, Ingredient, Units, activations, down_bias};
use super::weighted::{ReferenceCompat, Weighting, normalised};
use super::zip::greedy;
use crate::error::{Error, Result};
use crate::linalg::correlation;
use crate::model::Expert;
use crate::stage::{Context, Members, Merger, Needs, Stage};

/// Stacks the `K·f` hidden units of the members and unites the most alike two, of whichever
/// expert, until `f` are left.
///
/// Two units are alike by the correlation of their activations on the group's tokens, or by
/// `⟨w_in, w_in'⟩ + ⟨w_out, w_out'⟩`. Uniting `i` and `j` with weights `a_i`, `a_j` gives the unit
/// `(a_i w_i + a_j w_j) / (a_i + a_j)` of weight `a_i + a_j`: for gate row, up row and down column
/// alike. Its correlation with unit `k` becomes `alpha · min(c_ik, c_jk)`; its weight score is
/// recomputed, which by bilinearity is the same weighted mean of the two scores. At the end
/// [`Coefficients`] decides the scale of the down columns.
///
/// Shapes: scores `(K f, K f)`, activations `(t, K f)`. Cost: `O(t (K f)²)` or `O(d (K f)²)` for
/// the scores and about `O((K f)²)` for the pairing; memory `4 (K f)²` bytes, 0.5 GiB for two
/// experts of 5,632 units, which is what limits the method.
///
/// Source: Stoica et al., ZipIt! (arXiv 2305.03053), as used by M-SMoE's baselines. *Deviations:*
/// the down columns are weighted so that the merged expert keeps the scale of `Σ α_k E_k`
/// ([`Coefficients::Exact`]); a token that chose two members is counted once; weights instead of
/// activations decide where there are fewer than two tokens (the published code returns the first
/// expert); a row cache finds each pair instead of a search of the whole table.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZipIt {
    /// What units are compared by.
    pub ingredient: Ingredient,
    /// What the members count for.
    pub by: Weighting,
    /// The scale of the merged output weights.
    pub coefficients: Coefficients,
    /// Factor on the correlations of a united unit, 0 to 1: small values delay its next union.
    pub alpha: f32,
    /// Zip the other members first, then the result with the dominant expert.
    pub dominant_alone: bool,
}

impl Default for ZipIt {
    fn default() -> Self {
        Self {
            ingredient: Ingredient::default(),
            by: Weighting::default(),
            coefficients: Coefficients::default(),
            alpha: 0.1,
            dominant_alone: false,
        }
    }
}

impl Stage for ZipIt {
    fn name(&self) -> &str {
        match self.ingredient {
            Ingredient::Activations => "zipit",
            Ingredient::Weights => "zipit-weights",
        }
    }

    fn needs(&self) -> Needs {
        match self.ingredient {
            Ingredient::Activations => self.by.needs() | Needs::SAMPLES,
            Ingredient::Weights => self.by.needs(),
        }
    }
}

impl Merger for ZipIt {
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
        members.check()?;
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(Error::range("zipit alpha", "0 to 1", self.alpha));
        }
        let mut weights = self.by.weights(members, cx)?;
        if self.coefficients == Coefficients::Exact {
            weights = normalised(&weights)?;
        }
        let experts: Vec<Expert> =
            (0..members.experts.len()).map(|i| members.aligned(i, cx)).collect::<Result<_>>()?;
        let zip = |experts: &[Expert], weights: &[f64], indices: &[usize]| {
            let inputs = self.inputs(members, indices)?;
            self.zip(experts, weights, inputs.as_ref().map(|a| a.view()), cx)
        };
        if !self.dominant_alone {
            return zip(&experts, &weights, members.indices);
        }
        let at = members.dominant;
        let (mut rest, mut others) = (experts, members.indices.to_vec());
        let (dominant, own) = (rest.remove(at), weights.remove(at));
        others.remove(at);
        let absorbed: f64 = weights.iter().sum();
        if rest.is_empty() || (absorbed == 0.0 && own > 0.0) {
            return Ok(dominant);
        }
        let first = zip(&rest, &weights, &others)?;
        zip(&[first, dominant], &[absorbed, own], members.indices)
    }
}

impl ZipIt {
    fn inputs(&self, members: &Members<'_>, indices: &[usize]) -> Result<Option<Array2<f32>>> {
        if self.ingredient == Ingredient::Weights {
            return Ok(None);
        }
        let samples = members.layer.stats.need_samples(self.name())?;
        Ok(Some(samples.inputs_of(indices)).filter(|x| x.nrows() > 1))
    }

    fn zip(
        &self,
        experts: &[Expert],
        weights: &[f64],
        inputs: Option<ArrayView2<'_, f32>>,
        cx: &Context,
    ) -> Result<Expert> {
        let [first, _, ..] = experts else {
            let only = experts.first().cloned();
            return only.ok_or_else(|| Error::range("zipit", "an expert", "none"));
        };
        let shares = normalised(weights)?;
        // The published code adds 1e-7 to sums of weights that it has not normalised.
        let (per_expert, eps) = match self.coefficients {
            Coefficients::Exact => (&shares[..], 0.0),
            Coefficients::Reference => (weights, ReferenceCompat::default().eps),
        };
        let keep = first.view().d_ff();
        let weights: Vec<f64> =
            per_expert.iter().flat_map(|&w| std::iter::repeat_n(w, keep)).collect();
        let units = Units::of(experts)?;
        let pairs = match inputs {
            Some(x) => {
                let hidden = activations(experts, x, cx.compute())?;
                let score = correlation(hidden.view(), hidden.view(), cx.compute())?;
                drop(hidden);
                greedy(score, &weights, keep, |a, b, _, _| self.alpha * a.min(b))?
            }
            None => {
                let w = units.weights();
                let mut score = Array2::zeros((w.nrows(), w.nrows()));
                cx.compute().gemm(1.0, w, w.t(), 0.0, score.view_mut())?;
                greedy(score, &weights, keep, |a, b, wa, wb| {
                    let (pa, pb) = parts(wa, wb, eps);
                    pa * a + pb * b
                })?
            }
        };
        self.unite(units, weights, &pairs, eps).into_expert(down_bias(experts, &shares))
    }

    /// Carries the pairing out.
    fn unite(
        &self,
        mut units: Units,
        mut weights: Vec<f64>,
        pairs: &[(usize, usize)],
        eps: f64,
    ) -> Units {
        let mut gone = vec![false; weights.len()];
        for &(i, j) in pairs {
            let (pi, pj) = parts(weights[i], weights[j], eps);
            let (mut into, from) =
                units.rows.multi_slice_mut((ndarray::s![i, ..], ndarray::s![j, ..]));
            into.zip_mut_with(&from, |a, b| *a = pi * *a + pj * b);
            weights[i] += weights[j];
            gone[j] = true;
        }
        let kept: Vec<usize> = (0..gone.len()).filter(|&u| !gone[u]).collect();
        let mut left = units.with_rows(units.rows.select(Axis(0), &kept));
        if self.coefficients == Coefficients::Exact {
            // The rows are means; a set stands for all the weight that went into it.
            kept.iter().enumerate().for_each(|(at, &u)| left.scale_output(at, weights[u] as f32));
        }
        left
    }
}

/// The shares of two units in their mean; equal when neither has weight.
fn parts(a: f64, b: f64, eps: f64) -> (f32, f32) {
    let total = a + b + eps;
    if total > 0.0 { ((a / total) as f32, (b / total) as f32) } else { (0.5, 0.5) }
}
