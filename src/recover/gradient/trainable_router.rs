//! The router in training: its choice, and the way back from the applied weights to its rows.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis};

use super::adam::Param;
use crate::error::Result;
use crate::linalg::{Compute, exp};
use crate::model::{Router, Routing, RoutingRule, Score, close_dropped};

/// A router in training. The choice of experts is not differentiated, the applied weights of the
/// chosen ones are; the correction bias of the choice is fixed.
#[derive(Debug, Clone)]
pub(super) struct TrainableRouter {
    pub(super) weight: Param,
    pub(super) bias: Option<Param>,
    router: Router,
    /// The expert behind each row; dropped rows cannot be chosen.
    pub(super) map: Vec<Option<usize>>,
}

impl TrainableRouter {
    pub(super) fn new(router: &Router, map: Vec<Option<usize>>) -> Self {
        Self {
            weight: Param::new(router.weight().to_owned()),
            bias: router.bias().cloned().map(Param::row),
            router: router.clone(),
            map,
        }
    }

    /// The router as it is now.
    pub(super) fn router(&self) -> Router {
        self.router.clone()
    }

    /// Logits, `−∞` for dropped rows, and the choice.
    pub(super) fn route(
        &self,
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<(Array2<f32>, Routing)> {
        let mut logits = self.router.logits(x, compute)?;
        close_dropped(&mut logits, &self.map);
        let routing = self.router.route(logits.view())?;
        Ok((logits, routing))
    }

    /// Gradients of rows and bias, given `upstream: (t, k)`, those of the applied weights.
    pub(super) fn backward(
        &mut self,
        x: ArrayView2<'_, f32>,
        logits: &Array2<f32>,
        routing: &Routing,
        upstream: &Array2<f32>,
        compute: &dyn Compute,
    ) -> Result<()> {
        let rule = *self.router.rule();
        let mut delta = Array2::zeros(logits.dim());
        for (t, mut delta) in delta.rows_mut().into_iter().enumerate() {
            let chosen = Chosen {
                rows: routing.experts.row(t),
                weights: routing.weights.row(t),
                upstream: upstream.row(t),
            };
            chosen.logit_gradient(&rule, logits.row(t), &mut delta);
        }
        compute.gemm(1.0, delta.t(), x, 0.0, self.weight.gradient.view_mut())?;
        if let Some(bias) = &mut self.bias {
            bias.gradient.row_mut(0).assign(&delta.sum_axis(Axis(0)));
        }
        Ok(())
    }

    pub(super) fn step(&mut self, rate: f64) -> Result<()> {
        self.weight.step(rate);
        self.bias.iter_mut().for_each(|bias| bias.step(rate));
        self.refresh()
    }

    /// Rebuilds the router from the trained values.
    pub(super) fn refresh(&mut self) -> Result<()> {
        let correction = self.router.correction().cloned();
        let bias = self.bias.as_ref().map(Param::to_row);
        let rule = *self.router.rule();
        self.router = Router::new(self.weight.value.clone(), bias, correction, rule)?;
        Ok(())
    }
}

/// The slots of one token.
struct Chosen<'a> {
    rows: ArrayView1<'a, u32>,
    weights: ArrayView1<'a, f32>,
    upstream: ArrayView1<'a, f32>,
}

impl Chosen<'_> {
    /// `∂L/∂z: (n)` of one token, added to `out`. With `a_j = ∂L/∂w_j`, `w_j` the applied weights
    /// (scale included), `p` the scores and `ā = Σ w_j a_j / Σ w_j`:
    ///
    /// | scores | renormalised | `∂L/∂z_i` |
    /// |---|---|---|
    /// | softmax (also of top-k) | yes | `w_i (a_i − ā)` |
    /// | softmax | no | `[chosen] w_i a_i − p_i Σ_j w_j a_j` |
    /// | sigmoid | yes | `(1 − p_i) w_i (a_i − ā)` |
    /// | sigmoid | no | `(1 − p_i) w_i a_i` |
    fn logit_gradient(
        &self,
        rule: &RoutingRule,
        z: ArrayView1<'_, f32>,
        out: &mut ArrayViewMut1<'_, f32>,
    ) {
        let total: f32 = self.weights.sum();
        let inner: f32 = self.weights.iter().zip(self.upstream).map(|(w, a)| w * a).sum();
        let renormalised = rule.renormalise || rule.score == Score::SoftmaxOfTopK;
        let mean = if renormalised && total != 0.0 { inner / total } else { 0.0 };
        if rule.score == Score::Softmax && !renormalised {
            let top = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            out.zip_mut_with(&z, |o, z| *o = exp(z - top));
            let sum = out.sum();
            out.iter_mut().for_each(|o| *o *= -inner / sum);
        }
        for ((&row, w), a) in self.rows.iter().zip(self.weights).zip(self.upstream) {
            let row = row as usize;
            let slope = match rule.score {
                Score::Sigmoid => 1.0 - 1.0 / (1.0 + exp(-z[row])),
                Score::Softmax | Score::SoftmaxOfTopK => 1.0,
            };
            out[row] += slope * w * (a - mean);
        }
    }
}

/// For every slot of `routing` the gradient of the weight of the visit it belongs to: members of a
/// group that fire together share one.
pub(super) fn slot_gradients(
    routing: &Routing,
    map: &[Option<usize>],
    visits: &[Vec<(usize, f32)>],
    gradients: &[Vec<f32>],
) -> Array2<f32> {
    let mut next = vec![0; visits.len()];
    let mut out = Array2::zeros(routing.experts.dim());
    for (t, chosen) in routing.experts.rows().into_iter().enumerate() {
        for (slot, &row) in chosen.iter().enumerate() {
            let Some(expert) = map[row as usize] else { continue };
            // Visits are in order of tokens: step over those of earlier ones.
            while visits[expert].get(next[expert]).is_some_and(|(visitor, _)| *visitor < t) {
                next[expert] += 1;
            }
            out[[t, slot]] = gradients[expert].get(next[expert]).copied().unwrap_or(0.0);
        }
    }
    out
}
