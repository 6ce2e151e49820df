//! What a run will compute, read and write.

use serde::{Deserialize, Serialize};

use super::PlanOptions;
use super::fit::FitSize;
use super::memory::when;
use super::shape::{Layer, Shape};
use crate::group::Removal;
use crate::pipeline::options::{AlignWhen, RecoverOn};
use crate::pipeline::recipe::choices::{AlignChoice, GroupChoice, RecoverChoice};
use crate::pipeline::recipe::compress_choice::CompressChoice;
use crate::pipeline::recipe::{ExportChoice, Recipe};
use crate::recover::Per;
use crate::stage::Needs;

/// Short sides up to this have all eigenvalues computed for a stable rank.
const ALL_EIGENVALUES_SIDE: f64 = 512.0;

/// What a run computes, reads and writes: floating-point operations (FLOPs) of every phase, a
/// multiply-add counted as two, and bytes of files. How long that takes is for the machine to say:
/// a run tells the time left after its first layers.
///
/// With `t` tokens in windows of `w`, an expert of `e` parameters and `k` of them for a token, and
/// `F` the FLOPs of all layers per token (two a parameter of attention, shared experts and chosen
/// experts, `2 w a` for scores of heads of `a` columns together):
///
/// - calibrate: `t F`, three times that where gradients are collected;
/// - merge: `6 d_ff² d_model + 256 d_ff²` for each expert that is aligned (all but one, or in
///   groups all but the dominant); output errors on the samples, `4 k e` or `6 k e` a sample; where
///   removals are measured, all experts on those tokens, and `t³/6 + 2 t² (k d_ff/n + d_model)` for
///   every refit; decompositions, at the products that the randomised one may take;
/// - recover: what it sees of the text once more, through the original's and the merged experts, or
///   through what [`RecoverOn`] asks for; least squares: `6 t k e / 3` for features, then the Gram
///   matrix `t k² d_ff²`, a factorisation `(m d_ff)³/3` and two solutions per ridge; or products
///   between tokens `t² k² d_ff / m`, `t³/3` and two solutions, and the same for each ridge with at
///   most 2,048 tokens; or the latter and all passes of block Gauss–Seidel, which often stop
///   sooner; distillation: `14 t k d_ff d_model` an epoch.
///
/// Exponentials, hashes and conversions of element types are not counted. Verification and
/// evaluation are not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostPlan {
    /// FLOPs while text runs through the model; 0 when statistics are given.
    pub calibrate: u64,
    /// FLOPs while layers are measured, merged and compressed.
    pub merge: u64,
    /// FLOPs while they are recovered.
    pub recover: u64,
    /// FLOPs of all phases.
    pub total: u64,
    /// `total` as a multiple of `calibrate`; none when statistics are given.
    pub calibrations: Option<f64>,
    /// Bytes of the source that are read, each time that they are read.
    pub read_bytes: u64,
    /// Bytes of tensors that are written.
    pub write_bytes: u64,
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

pub(super) fn plan(job: &Job<'_>) -> CostPlan {
    let Job { shape, options, bytes: (source, target), .. } = *job;
    let experts: u64 = shape.layers.iter().map(|l| l.bytes).sum();
    let gradients = job.needs.contains(Needs::GRADIENTS) || job.needs.contains(Needs::FISHER);
    let passes = if gradients { 3.0 } else { 1.0 };
    let calibrate = if options.text { passes * job.forward(options.tokens, 1.0) } else { 0.0 };
    let merge = job.layers(&|l| job.aligned(l) + job.removals(l) + job.errors(l) + job.factors(l));
    let recover = job.recovered();
    let total = calibrate + merge + recover;
    let reads = if job.reads_experts_twice() { 2 } else { 1 };
    let read_bytes = match (options.text, job.once) {
        (true, true) => source,
        (true, false) => source + reads * experts,
        (false, _) => source + (reads - 1) * experts,
    };
    CostPlan {
        calibrate: calibrate as u64,
        merge: merge as u64,
        recover: recover as u64,
        total: total as u64,
        calibrations: options.text.then(|| total / calibrate.max(1.0)),
        read_bytes,
        write_bytes: target,
    }
}

impl Job<'_> {
    fn layers(&self, of: &dyn Fn(&Layer) -> f64) -> f64 {
        self.shape.layers.iter().map(of).sum()
    }

    /// FLOPs of `tokens` through all blocks, the experts `experts` times.
    fn forward(&self, tokens: u64, experts: f64) -> f64 {
        let (t, window) = (tokens as f64, self.options.window.min(tokens) as f64);
        let blocks = self.shape.blocks.len() as f64;
        let rest: f64 = self.shape.blocks.iter().map(|&p| 2.0 * p as f64).sum();
        let scores = 2.0 * window * self.shape.attention as f64 * blocks;
        let chosen = self.layers(&|l| 2.0 * (l.top_k * l.expert()) as f64);
        t * (rest + scores + experts * chosen)
    }

    fn reads_experts_twice(&self) -> bool {
        self.needs.contains(Needs::EXPERTS)
            || matches!(self.recipe.group, GroupChoice::Removal { .. })
            || when(&self.recipe.align) == Some(AlignWhen::BeforeGrouping)
    }

    /// FLOPs of lining up.
    fn aligned(&self, l: &Layer) -> f64 {
        let moved = match (&self.recipe.align, when(&self.recipe.align)) {
            (AlignChoice::Identity, _) | (_, None) => 0,
            (_, Some(AlignWhen::BeforeGrouping)) => l.experts.saturating_sub(1),
            (_, Some(AlignWhen::InGroups)) => l.experts.saturating_sub(l.kept),
        };
        (moved * l.d_ff * l.d_ff) as f64 * (6.0 * l.d_model as f64 + 256.0)
    }

    /// FLOPs of measuring removals: all experts on all tokens, and a refit of every move that
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

    /// FLOPs of comparing outputs on the samples, where nothing else looks at outputs.
    fn errors(&self, l: &Layer) -> f64 {
        if !self.recipe.measure_error || self.options.follows(self.recipe) {
            return 0.0;
        }
        let routers = if self.recipe.export == ExportChoice::Stock { 3.0 } else { 2.0 };
        routers * 2.0 * (self.options.samples() * l.top_k * l.expert()) as f64
    }

    /// FLOPs of decompositions and stable ranks.
    fn factors(&self, l: &Layer) -> f64 {
        let Some(choice) = &self.recipe.compress else { return 0.0 };
        let short = l.d_ff.min(l.d_model) as f64;
        let matrix = (l.d_ff * l.d_model) as f64;
        let matrices = l.expert() as f64 / matrix;
        let spectrum = matrix * short + 10.0 * short.powi(3);
        let stable =
            if short <= ALL_EIGENVALUES_SIDE { spectrum } else { 60.0 * 2.0 * matrix * 32.0 };
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

    /// FLOPs of recovery.
    fn recovered(&self) -> f64 {
        let t = self.options.recovered_tokens(self.recipe);
        let stages = self.recipe.recover.iter().map(|choice| {
            self.shape.layers.iter().map(|l| recovery(choice, l, t as f64)).sum::<f64>()
        });
        // What calibration has seen, unless that was a pass of its own.
        let original = if self.once { 0.0 } else { self.forward(t, 1.0) };
        let follow = match (self.options.follows(self.recipe), self.recipe.recover_on) {
            // Through the original's experts and the merged ones, which are then compared.
            (true, RecoverOn::SameInput) => self.forward(t, 3.0),
            (true, RecoverOn::OwnStream) => original + self.forward(t, 2.0),
            (true, RecoverOn::Original) => original,
            (false, _) => 0.0,
        };
        stages.sum::<f64>() + follow
    }
}

/// FLOPs of one stage of recovery on one layer.
fn recovery(choice: &RecoverChoice, layer: &Layer, t: f64) -> f64 {
    let (k, d_ff, d) = (layer.top_k as f64, layer.d_ff as f64, layer.d_model as f64);
    let pass = t * k * d_ff * d;
    match choice {
        RecoverChoice::LeastSquares(fit) => {
            FitSize::of(fit, layer, t as u64).operations(fit, layer)
        }
        RecoverChoice::UnitScale(fit) => {
            let features = layer.kept as f64 * d_ff;
            let solved = match fit.per == Per::Hidden && features <= fit.dense_limit as f64 {
                true => t * k * k * d_ff * d_ff + features.powi(3),
                false => 4.0 * pass * fit.iterations as f64,
            };
            6.0 * pass + solved
        }
        RecoverChoice::Paper(fit) => 14.0 * pass * fit.epochs as f64,
        // A tenth is held out and looked at after every epoch.
        RecoverChoice::Distill(fit) => (14.0 + 0.1 * 6.0) * pass * fit.epochs as f64,
        _ => 2.0 * pass,
    }
}
