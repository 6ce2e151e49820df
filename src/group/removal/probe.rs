//! Outputs of a layer's experts on sampled tokens: the data on which removals are measured.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use rand::Rng;

use super::Removal;
use crate::error::{Locate, Result};
use crate::linalg::Compute;
use crate::model::{Expert, Router};
use crate::par;
use crate::stage::{Context, LayerView};

/// Every fifth token judges a refit.
const JUDGES: usize = 5;

/// Tokens of a layer, and what every expert, chosen or not, makes of them.
pub(super) struct Probe<'a> {
    pub(super) router: &'a Router,
    /// `(t, n)`, bias included.
    logits: Array2<f32>,
    /// For each expert `E_i(x)`: `(t, width)`.
    pub(super) outputs: Vec<Array2<f32>>,
    /// For each expert `‖E_i(x)‖_∞` of every token, of all features.
    peaks: Vec<Vec<f32>>,
    /// For each expert its hidden activations, `(t, d_ff)`, where a refit is measured.
    pub(super) hidden: Option<Vec<Array2<f32>>>,
    /// What the layer gives: `(t, width)`.
    pub(super) target: Array2<f32>,
    /// Who visits whom before anything is removed.
    pub(super) start: Vec<Visits>,
}

/// The surviving experts that a token visits and the weights, each expert once.
pub(super) type Visits = Vec<(usize, f32)>;

impl<'a> Probe<'a> {
    pub(super) fn new(method: &Removal, layer: &LayerView<'a>, cx: &Context) -> Result<Self> {
        let samples = layer.stats.need_samples("removal")?;
        let experts = layer.experts("removal")?;
        let (all, most) = (samples.tokens(), method.tokens.max(1));
        let used = all.min(most);
        let rows: Vec<usize> = (0..used).map(|i| i * all / used).collect();
        let x = samples.inputs.select(Axis(0), &rows);
        let logits = layer.router.logits(x.view(), cx.compute())?;
        let narrow = signs(layer, method.width, cx.seed());
        let single = cx.per_task();
        let made = par::map(experts.len(), |i| {
            through(&experts[i], x.view(), narrow.as_ref(), method.refit, single.compute())
                .in_expert(i)
        })?;
        let width = made.first().map_or(0, |seen| seen.output.ncols());
        let (mut outputs, mut peaks, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
        for ExpertResponse { output, peak, activations } in made {
            outputs.push(output);
            peaks.push(peak);
            hidden.extend(activations);
        }
        let mut probe = Self {
            router: layer.router,
            logits,
            target: Array2::zeros((used, width)),
            outputs,
            peaks,
            hidden: method.refit.then_some(hidden),
            start: Vec::new(),
        };
        let tokens: Vec<usize> = (0..used).collect();
        let all: Vec<Option<usize>> = (0..experts.len()).map(Some).collect();
        probe.start = probe.route(&tokens, &all)?;
        for (t, visits) in probe.start.iter().enumerate() {
            for &(e, w) in visits {
                probe.target.row_mut(t).scaled_add(w, &probe.outputs[e].row(t));
            }
        }
        Ok(probe)
    }

    /// Number of tokens.
    pub(super) fn tokens(&self) -> usize {
        self.target.nrows()
    }

    /// Who visits whom when expert `i` is `map[i]`, or gone: dropped experts cannot be chosen, and
    /// weights of experts that have become one add up.
    pub(super) fn route(&self, tokens: &[usize], map: &[Option<usize>]) -> Result<Vec<Visits>> {
        let mut logits = self.logits.select(Axis(0), tokens);
        crate::model::close_dropped(&mut logits, map);
        let routing = self.router.route(logits.view())?;
        let of = |(chosen, weights): (ArrayView1<'_, u32>, ArrayView1<'_, f32>)| {
            let mut visits: Visits = Vec::new();
            for (&i, &w) in chosen.iter().zip(weights) {
                let Some(e) = map[i as usize] else { continue };
                match visits.iter_mut().find(|(known, _)| *known == e) {
                    Some((_, sum)) => *sum += w,
                    None => visits.push((e, w)),
                }
            }
            visits
        };
        Ok(routing.experts.rows().into_iter().zip(routing.weights.rows()).map(of).collect())
    }

    /// `‖t(x) − Σ_e w_e E_e(x)‖²` of one token; `scratch` has its width.
    pub(super) fn missed(&self, t: usize, visits: &Visits, scratch: &mut [f32]) -> f64 {
        let row = self.target.row(t);
        scratch.iter_mut().zip(row).for_each(|(s, &y)| *s = y);
        for &(e, w) in visits {
            let output = self.outputs[e].row(t);
            scratch.iter_mut().zip(output).for_each(|(s, &y)| *s -= w * y);
        }
        scratch.iter().map(|&s| f64::from(s) * f64::from(s)).sum()
    }

    /// `Σ ‖t‖²` of some tokens; 1 when they are all 0.
    pub(super) fn energy(&self, tokens: impl Iterator<Item = usize>) -> f64 {
        let square = |y: &f32| f64::from(*y) * f64::from(*y);
        let sum: f64 = tokens.map(|t| self.target.row(t).iter().map(square).sum::<f64>()).sum();
        if sum > 0.0 { sum } else { 1.0 }
    }

    /// The tokens that a refit sees, and those that judge it.
    pub(super) fn split(&self) -> (Vec<usize>, Vec<usize>) {
        (0..self.tokens()).partition(|t| t % JUDGES != JUDGES - 1)
    }

    /// The largest `‖E_i(x)‖_∞` of every expert over the tokens that it is chosen for.
    pub(super) fn peaks(&self) -> Vec<f64> {
        let mut peaks = vec![0.0f64; self.outputs.len()];
        for (t, visits) in self.start.iter().enumerate() {
            for &(e, _) in visits {
                peaks[e] = peaks[e].max(f64::from(self.peaks[e][t]));
            }
        }
        peaks
    }
}

/// What one expert makes of the tokens.
struct ExpertResponse {
    output: Array2<f32>,
    peak: Vec<f32>,
    activations: Option<Array2<f32>>,
}

/// Runs an expert; its output is projected, and its hidden activations kept, if asked for.
fn through(
    expert: &Expert,
    x: ArrayView2<'_, f32>,
    narrow: Option<&Array2<f32>>,
    keep: bool,
    compute: &dyn Compute,
) -> Result<ExpertResponse> {
    let view = expert.view();
    let hidden = view.hidden(x, compute)?;
    let mut output = Array2::zeros((x.nrows(), view.d_model()));
    compute.gemm(1.0, hidden.view(), view.down.weight.t(), 0.0, output.view_mut())?;
    if let Some(bias) = view.down.bias {
        output += &bias;
    }
    let largest = |y: ArrayView1<'_, f32>| y.iter().fold(0.0f32, |m, y| m.max(y.abs()));
    let peak = output.rows().into_iter().map(largest).collect();
    if let Some(narrow) = narrow {
        let mut few = Array2::zeros((x.nrows(), narrow.ncols()));
        compute.gemm(1.0, output.view(), narrow.view(), 0.0, few.view_mut())?;
        output = few;
    }
    Ok(ExpertResponse { output, peak, activations: keep.then_some(hidden) })
}

/// `(d_model, width)` entries `±1/√width` by the seed, where outputs are wider than that.
fn signs(layer: &LayerView<'_>, width: usize, seed: u64) -> Option<Array2<f32>> {
    let d = layer.router.weight().ncols();
    if d <= width {
        return None;
    }
    let mut rng = layer.id.random_numbers(seed);
    let size = 1.0 / (width.max(1) as f32).sqrt();
    let sign = || if rng.next_u32() & 1 == 0 { size } else { -size };
    Some(Array2::from_shape_simple_fn((d, width.max(1)), sign))
}
