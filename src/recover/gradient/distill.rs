//! Block distillation: gradient descent towards the original layer's output.

use ndarray::{ArrayView2, ArrayViewMut2};
use serde::{Deserialize, Serialize};

use super::training_loop::TrainingLoop;
use crate::error::Result;
use crate::model::MergedLayer;
use crate::recover::best_so_far::squares;
use crate::recover::recoverer;
use crate::stage::{Context, Recovery, Stage};

/// Trains the experts' matrices (biases included) and the rows of the router that is used, to
/// minimise `Σ_x ‖y(x) − t(x)‖²` between the merged layer's output `y` and the original layer's `t`
/// on the same inputs: Adam (0.9, 0.999), the learning rate falling by a half cosine to 0, batches
/// of shuffled tokens.
///
/// The choice of experts is made anew in every batch and not differentiated; the applied weights of
/// the chosen ones are, with renormalisation and scale; the correction bias of the choice is fixed.
/// An expert that no token of a batch visits is left alone in its step. After every epoch the
/// held-out rows are evaluated; the best state is returned, the layer as it came if none is better.
/// Tokens are shuffled by the context's seed and the layer.
///
/// The loss is divided by the mean energy of the targets: Adam's `ε` then means the same in every
/// layer. Shapes: `X, T: (t, d_model)`. Cost per epoch: `14 t k d_ff d_model` operations for gated
/// experts (three products forward, four back: inputs need no gradient). Memory: four times the
/// layer's experts, twice more for the best state and the start, and a batch.
///
/// The default rate: on small trained models with half of the experts kept by REAP saliency (24,064
/// tokens, a tenth held out, 20 epochs after least squares), 3e-3 left a held-out error of 0.018
/// and 0.040 (Mixtral, layers 0 and 1), 0.017 (Qwen3, layer 0) and 0.020 (OLMoE, layer 0), where
/// 1e-3 left 0.021, 0.048, 0.020 and 0.025: as much as twice the epochs gave.
///
/// Source: distillation after merging is the paper's (arXiv 2310.01334, §3.2), there over the whole
/// model and its labels; layer by layer needs neither.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distill {
    /// Passes over the tokens.
    pub epochs: usize,
    /// The learning rate at the start.
    pub learning_rate: f64,
    /// Tokens per step; at least 1.
    pub batch: usize,
    /// Whether the experts are trained.
    pub experts: bool,
    /// Whether the rows of the router are trained.
    pub router: bool,
}

impl Default for Distill {
    fn default() -> Self {
        Self { epochs: 20, learning_rate: 3e-3, batch: 512, experts: true, router: true }
    }
}

impl Stage for Distill {
    fn name(&self) -> &str {
        "distill"
    }
}

recoverer!(Distill);

impl Distill {
    fn fit(&self, task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer> {
        let training = TrainingLoop {
            epochs: self.epochs,
            batch: self.batch,
            learning_rate: self.learning_rate,
            experts: self.experts,
            router: self.router,
        };
        let energy = mean_energy(task);
        let cosine = |step: usize, steps: usize| {
            let angle = std::f64::consts::PI * step as f64 / steps as f64;
            0.5 * (1.0 + angle.cos())
        };
        let squares = |mut residual: ArrayViewMut2<'_, f32>, _: ArrayView2<'_, f32>| {
            let scale = (2.0 / (energy * residual.nrows() as f64)) as f32;
            residual.mapv_inplace(|r| r * scale);
        };
        training.run(task, merged, cosine, squares, cx)
    }
}

/// Mean `‖t‖²` of the fitted targets; 1 when they are all 0.
fn mean_energy(task: &Recovery<'_>) -> f64 {
    let sum = squares(task.targets.slice(ndarray::s![..task.fitted(), ..]));
    if sum > 0.0 { sum / task.fitted() as f64 } else { 1.0 }
}
