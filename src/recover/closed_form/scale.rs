//! One factor per expert: the least that a merge needs after averaging.

use ndarray::{Array2, ArrayView1};
use serde::{Deserialize, Serialize};

use super::features::Features;
use crate::error::{Locate, Result};
use crate::linalg::mean_eigenvalue;
use crate::model::{Expert, MergedLayer, common};
use crate::par;
use crate::recover::best_so_far::{BestSoFar, descending};
use crate::recover::recoverer;
use crate::stage::{Context, Recovery, Stage};

/// Scales the output of every expert by one factor, all factors fitted together:
///
/// `s = argmin Σ_x ‖Σ_e s_e w_e(x) E_e(x) − t(x)‖²`, folded into down projection and its bias.
///
/// Averaging shrinks activations; this undoes the mean of it, with `m` numbers that no sample is
/// too small for. [`LeastSquares`](crate::recover::LeastSquares) contains it. The normal equations,
/// `(G + λ I) (s − 1) = Σ_x ⟨w_e E_e, t − y⟩`, `G: (m, m)` the inner products of the experts'
/// weighted outputs, are solved by Cholesky with `λ = ridge · tr(G) / m`. Experts that no token
/// visits keep every bit. Cost: a forward pass and `t k² d_model` operations; memory
/// `4 t k (d_ff + d_model)` bytes.
///
/// Source: REPAIR (Jordan et al., arXiv 2211.08403) rescales units to restore variance; one factor
/// per expert, jointly over the layer's output, is our own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scale {
    /// Pull towards 1, relative to the mean diagonal; above 0.
    pub ridge: f64,
}

impl Default for Scale {
    fn default() -> Self {
        Self { ridge: 1e-3 }
    }
}

impl Stage for Scale {
    fn name(&self) -> &str {
        "scale"
    }
}

recoverer!(Scale);

impl Scale {
    fn fit(&self, task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer> {
        descending(&[self.ridge])?;
        task.check(&merged)?;
        let (features, residual) = Features::of_rows(task, 0..task.fitted(), &merged, cx)?;
        let outputs = outputs(&features, &merged, cx)?;
        let Some(steps) = steps(&features, &outputs, &residual, self.ridge, cx)? else {
            return Ok(merged);
        };
        let mut scaled = merged.clone();
        for (e, (expert, step)) in scaled.experts.iter_mut().zip(steps).enumerate() {
            if step != 0.0 {
                *expert = times(expert, (1.0 + step) as f32).in_expert(e)?;
            }
        }
        let mut best = BestSoFar::new(task, &merged, cx)?;
        best.consider(scaled, cx)?;
        Ok(best.or(merged))
    }
}

/// Each expert's weighted outputs, a row per visit: `(visits, d_model)`.
fn outputs(features: &Features, merged: &MergedLayer, cx: &Context) -> Result<Vec<Array2<f32>>> {
    let single = cx.per_task();
    par::map(features.parts.len(), |e| {
        let (part, down) = (&features.parts[e], merged.experts[e].view().down);
        let mut y = Array2::zeros((part.tokens.len(), down.weight.nrows()));
        single.compute().gemm(1.0, part.hidden.view(), down.weight.t(), 0.0, y.view_mut())?;
        if let Some(bias) = down.bias {
            let rows = y.rows_mut().into_iter().zip(&part.weights);
            rows.for_each(|(mut row, w)| row.scaled_add(*w, &bias));
        }
        Ok(y)
    })
}

/// `s − 1` of every expert; `None` when there is no output to scale.
fn steps(
    features: &Features,
    outputs: &[Array2<f32>],
    residual: &Array2<f32>,
    ridge: f64,
    cx: &Context,
) -> Result<Option<Vec<f64>>> {
    let m = outputs.len();
    let rows = par::map(m, |i| {
        let tokens = &features.parts[i].tokens;
        let pairs = tokens.iter().zip(outputs[i].rows());
        let mut row = vec![pairs.map(|(&t, y)| dot(y, residual.row(t))).sum::<f64>()];
        for (other, y) in features.parts[..=i].iter().zip(outputs) {
            let common = common(tokens, &other.tokens).into_iter();
            row.push(common.map(|(a, b)| dot(outputs[i].row(a), y.row(b))).sum());
        }
        Ok(row)
    })?;
    let rhs = Array2::from_shape_fn((m, 1), |(i, _)| rows[i][0]);
    let mut gram =
        Array2::from_shape_fn((m, m), |(i, j)| if j <= i { rows[i][j + 1] } else { 0.0 });
    let mean = mean_eigenvalue(&gram, m);
    if mean <= 0.0 {
        return Ok(None);
    }
    let solved = cx.backend().solve_ridged(&mut gram, ridge * mean, rhs.view())?;
    Ok(Some(solved.column(0).to_vec()))
}

fn dot(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The expert with its output multiplied.
fn times(expert: &Expert, factor: f32) -> Result<Expert> {
    let activation = expert.view().activation;
    let (gate, up, mut down) = expert.clone().into_parts();
    down.weight *= factor;
    down.bias.iter_mut().for_each(|bias| *bias *= factor);
    Expert::new(gate, up, down, activation)
}
