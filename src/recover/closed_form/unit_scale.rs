//! One factor per hidden unit, or per output of an expert.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, concatenate};
use serde::{Deserialize, Serialize};

use super::features::Features;
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Linear, MergedLayer};
use crate::par;
use crate::recover::best_so_far::{BestSoFar, descending};
use crate::recover::recoverer;
use crate::stage::{Context, Recovery, Stage};

/// What gets a factor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Every hidden unit: the columns of the down projection.
    #[default]
    Hidden,
    /// Every output: its rows.
    Output,
}

/// Scales the columns (or rows) of all down projections of a layer, all factors fitted together:
///
/// `s = argmin Σ_x ‖Σ_e w_e(x) W_e (s_e ⊙ h_e(x)) − t(x)‖² + λ ‖s − 1‖²`.
///
/// `m d_ff` (or `m d_model`) numbers: what averaging takes from a hidden unit's amplitude, no more,
/// for samples too small for [`LeastSquares`](crate::recover::LeastSquares), which contains it.
/// Solved for `s − 1`; the matrix of the normal equations is `A = (Φᵀ Φ) ⊙ (Wᵀ W)` for hidden
/// units, `λ` a ridge times its mean diagonal, from the largest ridge down until the error on the
/// held-out rows rises. Biases stay. Experts that no token visits keep every bit.
///
/// Up to `dense_limit` hidden units by a Cholesky factorisation per ridge: `t k² d_ff²` and
/// `(m d_ff)³/3` operations, memory `24 (m d_ff)²` bytes. Beyond, and for outputs, by conjugate
/// gradients that form no matrix, each ridge warm from the one before: `4 t k d_ff d_model`
/// operations an iteration, memory `8 t d_model` bytes and two copies of the down projections. Both
/// keep the hidden activations, `4 t k d_ff` bytes.
///
/// Source: REPAIR (Jordan et al., arXiv 2211.08403) restores each unit's variance after averaging;
/// fitting the factors to the layer's output, jointly and with a ridge, is our own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UnitScale {
    /// What gets a factor.
    pub per: Per,
    /// Pulls towards 1 to choose from, relative to the mean diagonal; each above 0.
    pub ridges: Vec<f64>,
    /// The most hidden units, `m · d_ff`, for which a matrix is formed.
    pub dense_limit: usize,
    /// The most iterations per ridge.
    pub iterations: usize,
    /// The relative residual of the normal equations at which they stop.
    pub tolerance: f64,
}

impl Default for UnitScale {
    fn default() -> Self {
        let ridges = vec![1e-2, 1e-1, 1.0, 10.0];
        Self { per: Per::Hidden, ridges, dense_limit: 4096, iterations: 48, tolerance: 1e-4 }
    }
}

impl Stage for UnitScale {
    fn name(&self) -> &str {
        "unit-scale"
    }
}

recoverer!(UnitScale);

impl UnitScale {
    fn fit(&self, task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer> {
        let ridges = descending(&self.ridges)?;
        task.check(&merged)?;
        let (features, residual) = Features::of_rows(task, 0..task.fitted(), &merged, cx)?;
        let down = merged.experts.iter().map(|e| e.view().down.weight).collect();
        let system = ScaleSystem { features: &features, down, per: self.per };
        let mean = system.mean_diagonal(cx)?;
        if mean <= 0.0 {
            return Ok(merged);
        }
        let rhs = system.contract(&features.moments(&residual, cx)?);
        let mut best = BestSoFar::new(task, &merged, cx)?;
        let mut steps = Array2::zeros(rhs.dim());
        let dense = self.per == Per::Hidden && features.width() <= self.dense_limit;
        let gram = dense.then(|| system.matrix(cx)).transpose()?;
        for ridge in ridges {
            match &gram {
                Some(gram) => steps = factorised(gram, ridge * mean, &rhs, cx)?,
                None => self.solve(&system, ridge * mean, &rhs, &mut steps, cx)?,
            }
            let layer = system.scaled_layer(&merged, &steps)?;
            if !best.consider(layer, cx)? {
                break;
            }
        }
        drop(system);
        Ok(best.or(merged))
    }

    /// Conjugate gradients for `(A + λ I) p = rhs`, on from the `p` that is given.
    fn solve(
        &self,
        system: &ScaleSystem<'_>,
        lambda: f64,
        rhs: &Array2<f64>,
        p: &mut Array2<f64>,
        cx: &Context,
    ) -> Result<()> {
        let goal = dot(rhs, rhs) * self.tolerance * self.tolerance;
        let mut residual = rhs - &system.apply(p, lambda, cx)?;
        let mut direction = residual.clone();
        let mut energy = dot(&residual, &residual);
        for _ in 0..self.iterations {
            if energy <= goal {
                break;
            }
            let applied = system.apply(&direction, lambda, cx)?;
            let curvature = dot(&direction, &applied);
            if curvature <= 0.0 {
                break;
            }
            let step = energy / curvature;
            p.scaled_add(step, &direction);
            residual.scaled_add(-step, &applied);
            let new = dot(&residual, &residual);
            direction.zip_mut_with(&residual, |d, r| *d = r + new / energy * *d);
            energy = new;
        }
        Ok(())
    }
}

/// `(A + λ I)⁻¹ rhs`, of the lower triangle of `A`.
fn factorised(
    gram: &Array2<f64>,
    lambda: f64,
    rhs: &Array2<f64>,
    cx: &Context,
) -> Result<Array2<f64>> {
    let column = Array2::from_shape_fn((rhs.len(), 1), |(i, _)| {
        rhs[[i / rhs.ncols().max(1), i % rhs.ncols().max(1)]]
    });
    let solved = cx.backend().solve_ridged(&mut gram.clone(), lambda, column.view())?;
    let at = |(e, a): (usize, usize)| solved[[e * rhs.ncols() + a, 0]];
    Ok(Array2::from_shape_fn(rhs.dim(), at))
}

fn dot(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The normal equations of the factors; a row of factors for every expert.
struct ScaleSystem<'a> {
    features: &'a Features,
    down: Vec<ArrayView2<'a, f32>>,
    per: Per,
}

impl ScaleSystem<'_> {
    /// The axis of a down projection along which there is a factor for every line.
    fn axis(&self) -> Axis {
        Axis(if self.per == Per::Hidden { 1 } else { 0 })
    }

    /// `W_e` with its columns (or rows) multiplied.
    fn scaled(&self, e: usize, factors: ArrayView1<'_, f64>) -> Array2<f32> {
        let mut weight = self.down[e].to_owned();
        for (mut line, f) in weight.axis_iter_mut(self.axis()).zip(factors) {
            line *= *f as f32;
        }
        weight
    }

    /// `Σ V ⊙ W_e` along the other axis, for one `V: (d_model, d_ff)` an expert.
    fn contract(&self, moments: &[Array2<f32>]) -> Array2<f64> {
        let lines = self.down.first().map_or(0, |w| w.len_of(self.axis()));
        let mut out = Array2::zeros((self.down.len(), lines));
        for ((mut row, v), w) in out.rows_mut().into_iter().zip(moments).zip(&self.down) {
            let pairs = v.axis_iter(self.axis()).zip(w.axis_iter(self.axis()));
            for (out, (v, w)) in row.iter_mut().zip(pairs) {
                *out = v.iter().zip(w).map(|(&v, &w)| f64::from(v) * f64::from(w)).sum();
            }
        }
        out
    }

    /// `(A + λ I) p`: one down pass over the tokens of each expert, and its transpose.
    fn apply(&self, p: &Array2<f64>, lambda: f64, cx: &Context) -> Result<Array2<f64>> {
        let scaled: Vec<_> =
            p.rows().into_iter().enumerate().map(|(e, p)| self.scaled(e, p)).collect();
        let views: Vec<_> = scaled.iter().map(|w| w.view()).collect();
        let width = self.down.first().map_or(0, |w| w.nrows());
        let mut pass = Array2::zeros((self.features.tokens(), width));
        self.features.subtract(&views, &mut pass, cx)?;
        let moments = self.features.moments(&pass, cx)?;
        Ok(lambda * p - self.contract(&moments))
    }

    /// The lower triangle of `A = (Φᵀ Φ) ⊙ (Wᵀ W): (m d_ff, m d_ff)`, for hidden units.
    fn matrix(&self, cx: &Context) -> Result<Array2<f64>> {
        let wide = concatenate(Axis(1), &self.down)
            .map_err(|e| Error::shape("down projections of one kind", "equal shapes", e))?;
        let mut products = Array2::zeros((wide.ncols(), wide.ncols()));
        cx.compute().add_gram(wide.view(), &mut products)?;
        Ok(self.features.gram()? * &products)
    }

    /// The mean of the diagonal of `A`.
    fn mean_diagonal(&self, cx: &Context) -> Result<f64> {
        let single = cx.per_task();
        let square = |x: f32| f64::from(x) * f64::from(x);
        let traces = par::map(self.down.len(), |e| {
            let (hidden, down) = (&self.features.parts[e].hidden, &self.down[e]);
            if self.per == Per::Hidden {
                let energy = |v: ArrayView1<'_, f32>| v.iter().map(|&x| square(x)).sum::<f64>();
                let units = hidden.columns().into_iter().zip(down.columns());
                return Ok(units.map(|(h, w)| energy(h) * energy(w)).sum());
            }
            let mut y = Array2::zeros((hidden.nrows(), down.nrows()));
            single.compute().gemm(1.0, hidden.view(), down.t(), 0.0, y.view_mut())?;
            Ok(y.iter().map(|&y| square(y)).sum::<f64>())
        })?;
        let lines: usize = self.down.iter().map(|w| w.len_of(self.axis())).sum();
        Ok(traces.iter().sum::<f64>() / lines.max(1) as f64)
    }

    /// The layer with every factor `1 + step`.
    fn scaled_layer(&self, start: &MergedLayer, steps: &Array2<f64>) -> Result<MergedLayer> {
        let mut layer = MergedLayer { factors: None, ..start.clone() };
        for (e, (expert, steps)) in layer.experts.iter_mut().zip(steps.rows()).enumerate() {
            let weight = self.scaled(e, steps.mapv(|s| 1.0 + s).view());
            let activation = expert.view().activation;
            let (gate, up, down) = expert.clone().into_parts();
            let down = Linear { weight, bias: down.bias };
            *expert = Expert::new(gate, up, down, activation).in_expert(e)?;
        }
        Ok(layer)
    }
}
