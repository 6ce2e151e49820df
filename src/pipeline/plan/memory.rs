//! How much memory a run will hold.

use serde::{Deserialize, Serialize};

use super::PlanOptions;
use super::fit::FitSize;
use super::shape::{Layer, Shape};
use crate::group::Removal;
use crate::pipeline::options::{AlignWhen, RecoverOn};
use crate::pipeline::recipe::Recipe;
use crate::pipeline::recipe::choices::{AlignChoice, GroupChoice, RecoverChoice};
use crate::stage::Needs;

/// Bytes that the process holds before a layer is read, and the allocator above what is in use.
const BASE: u64 = 64 << 20;
/// A batch of windows on its way, its attention and its products.
const BATCH: u64 = 4 * (32 << 20);

/// Predicted resident memory of every phase, in bytes.
///
/// Let a layer have `n` experts of `d_ff` units, `m` that stay, `P` expert parameters and `B`
/// bytes on the disk, of which all mapped pages count as resident until the layer is released; `t`
/// tokens, `s` samples (`min(t, 4096)`, if a stage needs them), `k` experts per token, `T`
/// threads. The largest layer decides:
///
/// - calibrate: `4 P + B`, the other tensors of the block in `f32`, hidden states `4 t d_model` up
///   to the bound, as much again for what recovery follows where one pass does all, a batch, the
///   samples `4 s (2 d_model + n + 2 k)`;
/// - measure: `4 P + B` where similarity reads experts or alignment comes first, twice `4 P` with
///   that; gain matrices `8 T d_ff²`; else the routers; where removals are measured, on `t'` of
///   the samples, `4 P + B`, those and `4 n t' (d_model + d_ff) + 24 T t'²`;
/// - merge: `4 P (1 + m/n) + B`, samples, gain matrices, and what recovery holds: inputs, targets
///   `16 t d_model` and the layer behind them when it follows text, hidden activations
///   `4 t k d_ff`, and for least squares `40 (m d_ff)²`, or where it is solved by tokens
///   `16 t² + 24 t d_model + 8 m d_ff d_model`, or by blocks of `b` features
///   `8 t d_model + 4 m d_ff (b + 3 d_model)`; for distillation `28 P m/n`.
///
/// The allocator and what is not in the list are taken as 64 MiB. The pages of shards that are
/// copied are given back and not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// While text runs through the model; 0 when statistics are given.
    pub calibrate: u64,
    /// While layers are measured.
    pub measure: u64,
    /// While layers are merged, recovered and compressed.
    pub merge: u64,
    /// Hidden states in memory, part of the phases that run text.
    pub states: u64,
    /// Hidden states in a scratch file on the disk.
    pub scratch: u64,
    /// The largest of the phases.
    pub peak: u64,
}

pub(super) fn plan(
    shape: &Shape,
    recipe: &Recipe,
    needs: Needs,
    options: &PlanOptions,
    (most_states, once): (u64, bool),
) -> MemoryPlan {
    let follows = options.follows(recipe);
    let original = 4 * options.tokens * shape.d_model;
    let merged = follows && recipe.recover_on.follows();
    let followed = if merged { 4 * options.recovered_tokens(recipe) * shape.d_model } else { 0 };
    // In one pass both streams are on their way at a time.
    let targets = if recipe.recover_on == RecoverOn::OwnStream { followed } else { 0 };
    let streams = if once { [original, followed] } else { [original.max(followed), targets] };
    let states: u64 = streams.iter().sum();
    let held: u64 = streams.iter().filter(|&&bytes| bytes <= most_states).sum();
    let block = 4 * shape.blocks.iter().copied().max().unwrap_or(0);
    let most = |of: &dyn Fn(&Layer) -> u64| shape.layers.iter().map(of).max().unwrap_or(0);
    let samples = |l: &Layer| match needs.contains(Needs::SAMPLES) {
        true => 4 * options.samples() * (2 * l.d_model + l.experts + 2 * l.top_k),
        false => 0,
    };
    let calibrate =
        BASE + block + held + BATCH + most(&|l| 4 * l.parameters + l.bytes + samples(l));
    let surveyed = most(&|l| match survey(l, recipe, options) {
        0 => 0,
        held => held + samples(l),
    });
    let measure = BASE + surveyed.max(most(&|l| measure(l, recipe, needs, options)));
    let stream = if follows || once { block + held + BATCH } else { 0 };
    let merge = BASE + stream + most(&|l| merge(l, recipe, options) + samples(l));
    let calibrate = if options.text { calibrate } else { 0 };
    let peak = calibrate.max(measure).max(merge);
    MemoryPlan { calibrate, measure, merge, states: held, scratch: states - held, peak }
}

/// Gain matrices of alignment, one for every thread, and the assignment's own copy.
fn gains(layer: &Layer, options: &PlanOptions) -> u64 {
    8 * options.threads as u64 * layer.d_ff * layer.d_ff
}

fn measure(layer: &Layer, recipe: &Recipe, needs: Needs, options: &PlanOptions) -> u64 {
    let first = when(&recipe.align) == Some(AlignWhen::BeforeGrouping);
    if first {
        return 8 * layer.parameters + layer.bytes + gains(layer, options);
    }
    match needs.contains(Needs::EXPERTS) {
        true => 4 * layer.parameters + layer.bytes,
        false => 4 * layer.experts * layer.d_model,
    }
}

/// What a grouper that measures removals holds: the layer, and every expert's outputs (and hidden
/// activations, for a refit) on its tokens.
fn survey(layer: &Layer, recipe: &Recipe, options: &PlanOptions) -> u64 {
    let GroupChoice::Removal { refit, tokens, .. } = recipe.group else { return 0 };
    let base = Removal::default();
    let t = options.samples().min(tokens.unwrap_or(base.tokens) as u64);
    let seen = layer.d_model.min(base.width as u64) + if refit { layer.d_ff } else { 0 };
    let systems = if refit { 24 * options.threads as u64 * t * t } else { 0 };
    4 * layer.parameters + layer.bytes + 4 * layer.experts * t * seen + systems
}

/// When a recipe lines experts up; `None` for never.
pub(super) fn when(align: &AlignChoice) -> Option<AlignWhen> {
    match align {
        AlignChoice::Identity => None,
        AlignChoice::WeightMatching { when, .. } | AlignChoice::ActivationMatching { when, .. } => {
            Some(*when)
        }
    }
}

fn merge(layer: &Layer, recipe: &Recipe, options: &PlanOptions) -> u64 {
    let kept = layer.expert() * layer.kept;
    let mut bytes = 4 * (layer.parameters + kept) + layer.bytes;
    if when(&recipe.align) == Some(AlignWhen::InGroups) {
        bytes += gains(layer, options);
    }
    let t = options.recovered_tokens(recipe);
    let recovered = recipe.recover.iter().map(|choice| match choice {
        RecoverChoice::LeastSquares(fit) => FitSize::of(fit, layer, t).bytes(layer),
        RecoverChoice::UnitScale(fit) => {
            let units = (layer.kept * layer.d_ff).min(fit.dense_limit as u64);
            4 * t * layer.top_k * layer.d_ff + 8 * kept + 24 * units * units
        }
        RecoverChoice::Distill(_) | RecoverChoice::Paper(_) => 28 * kept,
        _ => 0,
    });
    let recovered = recovered.max().unwrap_or(0);
    let seen = if recipe.recover.is_empty() { 0 } else { 16 * t * layer.d_model };
    let factors = if recipe.compress.is_some() { 8 * kept } else { 0 };
    bytes + recovered + seen + factors
}
