//! How long a run will take.

use std::hint::black_box;
use std::time::Instant;

use ndarray::Array2;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::PlanOptions;
use super::memory::when;
use super::shape::{Layer, Shape};
use crate::group::Removal;
use crate::pipeline::choice::{GroupChoice, RecoverChoice};
use crate::pipeline::recipe::Recipe;
use crate::recover::Per;
use crate::stage::Context;

/// What this machine does in a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Floating-point operations of a matrix product of `(256, 1024)` by `(1024, 1024)`.
    pub flops: f64,
    /// Bytes in `f32` that are made of bf16.
    pub convert: f64,
    /// Bytes that are hashed by SHA-256 on one thread.
    pub hash: f64,
}

impl Rates {
    /// Measures each for about a tenth of a second, on the context's device and threads.
    pub fn measure(cx: &Context) -> Self {
        let (x, w) = (Array2::<f32>::ones((256, 1024)), Array2::<f32>::ones((1024, 1024)));
        let mut product = Array2::<f32>::zeros((256, 1024));
        let flops = rate(2.0 * 256.0 * 1024.0 * 1024.0, || {
            let done = cx.compute().gemm(1.0, x.view(), w.view(), 0.0, product.view_mut());
            black_box((&product, done.is_ok()));
        });
        let bf16 = vec![half::bf16::ONE; 1 << 20];
        let mut wide = vec![0f32; bf16.len()];
        let convert = rate(4.0 * bf16.len() as f64, || {
            wide.iter_mut().zip(&bf16).for_each(|(to, from)| *to = from.to_f32());
            black_box(&wide);
        });
        let bytes = vec![7u8; 1 << 20];
        let hash = rate(bytes.len() as f64, || {
            black_box(Sha256::digest(&bytes));
        });
        Self { flops, convert, hash }
    }
}

/// Units per second of work that holds `units`, over the tries that fit in a tenth of a second
/// after one to warm up. What other processes take is taken from the run too.
fn rate(units: f64, mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut tries) = (Instant::now(), 0.0);
    while start.elapsed().as_secs_f64() < 0.1 {
        work();
        tries += 1.0;
    }
    units * tries / start.elapsed().as_secs_f64()
}

/// Predicted seconds of every phase, from operations and bytes at the measured [`Rates`].
///
/// With `t` tokens, `B_l` bytes in `f32` and `F_l` operations per token of layer `l`:
///
/// - calibrate: `Σ_l B_l / convert + t F_l / flops`;
/// - merge: reading likewise; `6 d_ff² d_model` operations for each expert that is lined up, and as
///   many again for its assignment; where removals are measured, reading once more, all experts
///   on those tokens, and `t³/6 + 2 t² (k d_ff/n + d_model)` for every refit;
/// - recovery: what it sees of the text once more, least squares `t k² d_ff² + (m d_ff)³` or 48
///   conjugate-gradient steps of `4 t k d_ff d_model`, `14 t k d_ff d_model` for an epoch of
///   distillation;
/// - write: the target's bytes, converted and hashed, and the source's, read.
///
/// A model, not a promise: it does not know the disk, or what else the machine will do, and the
/// rates are those of large products. Conjugate gradients are counted with every iteration that the
/// recipe allows; they often stop sooner.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TimePlan {
    /// While text runs through the model.
    pub calibrate: f64,
    /// While layers are measured and merged.
    pub merge: f64,
    /// While they are recovered.
    pub recover: f64,
    /// While the target is written.
    pub write: f64,
    /// All of it.
    pub total: f64,
    /// What was measured.
    pub rates: Rates,
}

pub(super) fn plan(
    shape: &Shape,
    recipe: &Recipe,
    options: &PlanOptions,
    (read, written): (u64, u64),
    rates: &Rates,
) -> TimePlan {
    let f = |n: u64| n as f64;
    let layers = |of: &dyn Fn(&Layer) -> f64| shape.layers.iter().map(of).sum::<f64>();
    let held =
        4.0 * (shape.blocks.iter().copied().map(f).sum::<f64>() + layers(&|l| f(l.parameters)));
    let load = held / rates.convert;
    let met = |tokens: u64| {
        let scores = 4.0 * f(options.window) * f(shape.d_model) * shape.blocks.len() as f64;
        let rest: f64 = shape.blocks.iter().map(|&p| 2.0 * f(p)).sum();
        let experts = layers(&|l| 2.0 * f(l.top_k * l.expert()));
        f(tokens) * (rest + scores + experts) / rates.flops
    };
    let calibrate = if options.text { load + met(options.tokens) } else { 0.0 };
    let aligned = |l: &Layer| {
        let moved =
            if when(&recipe.align).is_some() { l.experts - l.kept.min(l.experts) } else { 0 };
        12.0 * f(moved) * f(l.d_ff * l.d_ff) * f(l.d_model)
    };
    let surveys = |l: &Layer| survey(l, recipe, f(options.samples()));
    let again = if matches!(recipe.group, GroupChoice::Removal { .. }) { load } else { 0.0 };
    let merge = load + again + (layers(&aligned) + layers(&surveys)) / rates.flops;
    let t = options.recovered_tokens(recipe);
    let stages = recipe.recover.iter().map(|choice| layers(&|l| recovery(choice, l, f(t))));
    let stages = stages.sum::<f64>() / rates.flops;
    let recover = stages + if options.follows(recipe) { 2.0 * met(t) } else { 0.0 };
    let write = f(written) / rates.hash + f(read.max(written)) / rates.convert;
    let total = calibrate + merge + recover + write;
    TimePlan { calibrate, merge, recover, write, total, rates: *rates }
}

/// Operations of measuring removals: all experts on all tokens, and a refit of every move that is
/// listed.
fn survey(layer: &Layer, recipe: &Recipe, samples: f64) -> f64 {
    let GroupChoice::Removal { refit, tokens, shortlist, .. } = recipe.group else { return 0.0 };
    let base = Removal::default();
    let t = samples.min(tokens.unwrap_or(base.tokens) as f64);
    let (n, d_ff, d) = (layer.experts as f64, layer.d_ff as f64, layer.d_model as f64);
    let fits = if refit { 2.0 * n * shortlist.unwrap_or(base.shortlist) as f64 } else { 0.0 };
    let width = d.min(base.width as f64);
    let fit = t.powi(3) / 6.0 + 2.0 * t * t * (layer.top_k as f64 * d_ff / n + width);
    6.0 * n * t * d * d_ff + fits * fit
}

/// Operations of one stage of recovery on one layer.
fn recovery(choice: &RecoverChoice, layer: &Layer, t: f64) -> f64 {
    let (k, d_ff) = (layer.top_k as f64, layer.d_ff as f64);
    let pass = t * k * d_ff * layer.d_model as f64;
    match choice {
        RecoverChoice::LeastSquares(fit) => {
            let features = layer.kept as f64 * d_ff;
            match features <= fit.dense_limit as f64 {
                true => 6.0 * pass + t * k * k * d_ff * d_ff + features.powi(3),
                false => 6.0 * pass + 4.0 * pass * fit.iterations as f64,
            }
        }
        RecoverChoice::UnitScale(fit) => {
            let features = layer.kept as f64 * d_ff;
            match fit.per == Per::Hidden && features <= fit.dense_limit as f64 {
                true => 6.0 * pass + t * k * k * d_ff * d_ff + features.powi(3),
                false => 6.0 * pass + 4.0 * pass * fit.iterations as f64,
            }
        }
        RecoverChoice::Paper(fit) => 14.0 * pass * fit.epochs as f64,
        RecoverChoice::Distill(fit) => 14.0 * pass * fit.epochs as f64,
        _ => 2.0 * pass,
    }
}
