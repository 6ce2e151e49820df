//! How long a run will take.

use serde::{Deserialize, Serialize};

use super::PlanOptions;
use super::fit::FitSize;
use super::memory::when;
use super::rates::Rates;
use super::shape::{Layer, Shape};
use crate::group::Removal;
use crate::pipeline::options::{AlignWhen, RecoverOn};
use crate::pipeline::recipe::choices::{AlignChoice, GroupChoice, RecoverChoice};
use crate::pipeline::recipe::compress_choice::CompressChoice;
use crate::pipeline::recipe::{ExportChoice, Recipe};
use crate::recover::Per;
use crate::stage::Needs;

/// Shares of the predicted time between which runs were found, without a load; `docs/CLI.md` has
/// which.
const FOUND: (f64, f64) = (0.6, 2.0);
/// How much longer an operation in `f64` takes.
pub(super) const WIDE: f64 = 2.0;
/// Short sides up to this have all eigenvalues computed for a stable rank.
const EXACT: f64 = 512.0;

/// Predicted seconds of every phase, from operations and bytes at the measured [`Rates`].
///
/// With `t` tokens in windows of `w`, `B` bytes of the model, `P` the parameters of its blocks, an
/// expert of `e` parameters and `k` of them for a token; `F` the operations of all layers per token
/// (two a parameter of attention, shared experts and chosen experts, `2 w a` for scores of heads of
/// `a` columns together) and `E` its exponentials (`k d_ff` of activations, `w/2` for each head):
///
/// - calibrate: `B / read + 4 P / convert + t (F / flops + E / exp)`, three times the last where
///   gradients are collected;
/// - merge: reading again; `6 d_ff² d_model + 256 d_ff²` operations for each expert that is lined
///   up (all but one, or in groups all but the dominant); output errors on the samples, `4 k e` or
///   `6 k e` a sample; where removals are measured, all experts on those tokens, and
///   `t³/6 + 2 t² (k d_ff/n + d_model)` for every refit; decompositions, at the products that the
///   randomised one may take;
/// - recover: what it sees of the text once more, through the original's and the merged experts, or
///   through what [`RecoverOn`] asks for;
///   least squares: `6 t k e / 3` for features, then, in `f64`, the Gram matrix `t k² d_ff²`, a
///   factorisation `(m d_ff)³/3` and two solutions per ridge; or products between tokens
///   `t² k² d_ff / m`, `t³/3` and two solutions, and the same for each ridge with at most 2,048
///   tokens; or the latter and all conjugate-gradient steps, of `4 t k d_ff d_model`;
///   distillation: `14 t k d_ff d_model` an epoch at the rate of its steps, three times `t k d_ff`
///   exponentials, and `m e` updates a step;
/// - write: the target's bytes, checked (XXH3), hashed (SHA-256) and converted;
/// - verify: the target hashed and read once more, the source's bytes read and compared.
///
/// A model, not a promise: caches decide what reading costs, and the disk's rate of writing is not
/// measured, because a plan writes nothing. Conjugate gradients are counted with every iteration
/// that the recipe allows; they often stop sooner. [`TimePlan::range`] is 0.6 to
/// `2 + load` times the total, with the load of a core: a short measurement gets more of a busy
/// processor than a long run does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TimePlan {
    /// While text runs through the model.
    pub calibrate: f64,
    /// While layers are measured, merged and compressed.
    pub merge: f64,
    /// While they are recovered.
    pub recover: f64,
    /// While the target is written.
    pub write: f64,
    /// While `run` verifies the target.
    pub verify: f64,
    /// All of it.
    pub total: f64,
    /// Shortest and longest total to expect.
    pub range: (f64, f64),
    /// What was measured.
    pub rates: Rates,
}

/// What is planned.
pub(super) struct Job<'a> {
    pub(super) shape: &'a Shape,
    pub(super) recipe: &'a Recipe,
    pub(super) options: &'a PlanOptions,
    pub(super) needs: Needs,
    /// Bytes of all tensors of the source and of the target.
    pub(super) bytes: (u64, u64),
    /// Whether one pass does all.
    pub(super) once: bool,
}

/// Tokens of a step of the recipe's distillation, 0 without.
pub(super) fn step(recipe: &Recipe) -> u64 {
    let batch = |choice: &RecoverChoice| match choice {
        RecoverChoice::Distill(fit) => Some(fit.batch as u64),
        _ => None,
    };
    recipe.recover.iter().find_map(batch).unwrap_or(0)
}

pub(super) fn plan(job: &Job<'_>, rates: &Rates) -> TimePlan {
    let Job { shape, options, bytes: (source, target), .. } = *job;
    let (source, target) = (source as f64, target as f64);
    let blocks: u64 = shape.blocks.iter().sum();
    let routed: u64 = shape.layers.iter().map(|l| l.parameters).sum();
    let convert = |parameters: u64| 4.0 * parameters as f64 / rates.convert;
    let read = rates.read.map_or(0.0, |rate| source / rate);
    let gradients = job.needs.contains(Needs::GRADIENTS) || job.needs.contains(Needs::FISHER);
    let calibrate = match options.text {
        true => {
            let passes = if gradients { 3.0 } else { 1.0 };
            read + convert(blocks + routed) + passes * job.forward(options.tokens, 1.0, rates)
        }
        false => 0.0,
    };
    // What was read for calibration is taken to be cached where the files are smaller than memory.
    let again = if options.text { 0.0 } else { read };
    let reads = if job.reads_experts_twice() { 2.0 } else { 1.0 };
    let merge = again
        + reads * convert(routed)
        + job.layers(&|l| job.aligned(l) + job.removals(l) + job.errors(l) + job.factors(l))
            / rates.flops;
    let recover = job.recovered(rates);
    let write = target / rates.check + target / rates.hash + target / rates.convert;
    // Both folders were read or written just now.
    let verify =
        target / rates.hash + 3.0 * target / rates.convert + source.min(target) / rates.check;
    let total = calibrate + merge + recover + write + verify;
    let range = (FOUND.0 * total, (FOUND.1 + rates.load.unwrap_or(0.0)) * total);
    TimePlan { calibrate, merge, recover, write, verify, total, range, rates: *rates }
}

impl Job<'_> {
    fn layers(&self, of: &dyn Fn(&Layer) -> f64) -> f64 {
        self.shape.layers.iter().map(of).sum()
    }

    /// Seconds for `tokens` through all blocks, the experts `experts` times.
    fn forward(&self, tokens: u64, experts: f64, rates: &Rates) -> f64 {
        let (t, window) = (tokens as f64, self.options.window.min(tokens) as f64);
        let blocks = self.shape.blocks.len() as f64;
        let (heads, width) = (self.shape.heads as f64, self.shape.attention as f64);
        let rest: f64 = self.shape.blocks.iter().map(|&p| 2.0 * p as f64).sum();
        let scores = 2.0 * window * width * blocks;
        let chosen = self.layers(&|l| 2.0 * (l.top_k * l.expert()) as f64);
        let exp =
            0.5 * window * heads * blocks + experts * self.layers(&|l| (l.top_k * l.d_ff) as f64);
        t * (rest + scores + experts * chosen) / rates.flops + t * exp / rates.exp
    }

    fn reads_experts_twice(&self) -> bool {
        self.needs.contains(Needs::EXPERTS)
            || matches!(self.recipe.group, GroupChoice::Removal { .. })
            || when(&self.recipe.align) == Some(AlignWhen::BeforeGrouping)
    }

    /// Operations of lining up.
    fn aligned(&self, l: &Layer) -> f64 {
        let moved = match (&self.recipe.align, when(&self.recipe.align)) {
            (AlignChoice::Identity, _) | (_, None) => 0,
            (_, Some(AlignWhen::BeforeGrouping)) => l.experts.saturating_sub(1),
            (_, Some(AlignWhen::InGroups)) => l.experts.saturating_sub(l.kept),
        };
        (moved * l.d_ff * l.d_ff) as f64 * (6.0 * l.d_model as f64 + 256.0)
    }

    /// Operations of measuring removals: all experts on all tokens, and a refit of every move that
    /// is listed.
    fn removals(&self, l: &Layer) -> f64 {
        let GroupChoice::Removal { refit, tokens, shortlist, .. } = self.recipe.group else {
            return 0.0;
        };
        let base = Removal::default();
        let t = (self.options.samples() as f64).min(tokens.unwrap_or(base.tokens) as f64);
        let (n, d_ff, d) = (l.experts as f64, l.d_ff as f64, l.d_model as f64);
        let fits = if refit { 2.0 * n * shortlist.unwrap_or(base.shortlist) as f64 } else { 0.0 };
        let width = d.min(base.width as f64);
        let fit = t.powi(3) / 6.0 + 2.0 * t * t * (l.top_k as f64 * d_ff / n + width);
        6.0 * n * t * d * d_ff + fits * fit
    }

    /// Operations of comparing outputs on the samples, where nothing else looks at outputs.
    fn errors(&self, l: &Layer) -> f64 {
        if !self.recipe.measure_error || self.options.follows(self.recipe) {
            return 0.0;
        }
        let routers = if self.recipe.export == ExportChoice::Stock { 3.0 } else { 2.0 };
        routers * 2.0 * (self.options.samples() * l.top_k * l.expert()) as f64
    }

    /// Operations of decompositions and stable ranks.
    fn factors(&self, l: &Layer) -> f64 {
        let Some(choice) = &self.recipe.compress else { return 0.0 };
        let short = l.d_ff.min(l.d_model) as f64;
        let matrix = (l.d_ff * l.d_model) as f64;
        let matrices = l.expert() as f64 / matrix;
        let spectrum = WIDE * (matrix * short + 10.0 * short.powi(3));
        let stable = if short <= EXACT { spectrum } else { 60.0 * 2.0 * matrix * 32.0 };
        let of_one = match choice {
            CompressChoice::LowRankSparse { rank, .. }
            | CompressChoice::LowRankSensitive { rank, .. }
            | CompressChoice::Svd { rank }
            | CompressChoice::Complement { rank, .. } => {
                12.0 * 2.0 * matrix * (*rank as f64 + 16.0)
            }
            CompressChoice::Sparse { .. } => 0.0,
            // Moments of the inputs, and all singular values.
            _ => 2.0 * spectrum,
        };
        let kept = l.kept as f64;
        matrices * (l.experts as f64 * stable + kept * (2.0 * stable + of_one))
    }

    /// Seconds of recovery.
    fn recovered(&self, rates: &Rates) -> f64 {
        let t = self.options.recovered_tokens(self.recipe);
        let stages = self.recipe.recover.iter().map(|choice| {
            self.shape.layers.iter().map(|l| recovery(choice, l, t as f64, rates)).sum::<f64>()
        });
        // What calibration has seen, unless that was a pass of its own.
        let original = if self.once { 0.0 } else { self.forward(t, 1.0, rates) };
        let follow = match (self.options.follows(self.recipe), self.recipe.recover_on) {
            // Through the original's experts and the merged ones, which are then compared.
            (true, RecoverOn::SameInput) => self.forward(t, 3.0, rates),
            (true, RecoverOn::OwnStream) => original + self.forward(t, 2.0, rates),
            (true, RecoverOn::Original) => original,
            (false, _) => 0.0,
        };
        stages.sum::<f64>() + follow
    }
}

/// Seconds of one stage of recovery on one layer.
fn recovery(choice: &RecoverChoice, layer: &Layer, t: f64, rates: &Rates) -> f64 {
    let (k, d_ff, d) = (layer.top_k as f64, layer.d_ff as f64, layer.d_model as f64);
    let pass = t * k * d_ff * d;
    let exp = t * k * d_ff / rates.exp;
    match choice {
        RecoverChoice::LeastSquares(fit) => {
            let size = FitSize::of(fit, layer, t as u64);
            size.operations(fit, layer) / rates.flops + size.rows() * k * d_ff / rates.exp
        }
        RecoverChoice::UnitScale(fit) => {
            let features = layer.kept as f64 * d_ff;
            let solved = match fit.per == Per::Hidden && features <= fit.dense_limit as f64 {
                true => WIDE * (t * k * k * d_ff * d_ff + features.powi(3)),
                false => 4.0 * pass * fit.iterations as f64,
            };
            (6.0 * pass + solved) / rates.flops + exp
        }
        RecoverChoice::Paper(fit) => {
            fit.epochs as f64 * (14.0 * pass / rates.step_flops + 3.0 * exp)
        }
        RecoverChoice::Distill(fit) => {
            let epochs = fit.epochs as f64;
            let steps = (t / fit.batch.max(1) as f64).ceil();
            let moved = (layer.kept * layer.expert()) as f64;
            let judged = 0.1 * 6.0 * pass / rates.flops;
            let trained = 14.0 * pass / rates.step_flops + 3.0 * exp;
            epochs * (trained + judged + steps * moved / rates.update)
        }
        _ => 2.0 * pass / rates.flops,
    }
}
