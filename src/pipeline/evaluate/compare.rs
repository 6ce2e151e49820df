//! What a merged checkpoint predicts otherwise than the original.

use std::path::Path;

use ndarray::{ArrayView1, Axis};
use serde::{Deserialize, Serialize};

use crate::calibrate::text::Limits;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Locate, Result};
use crate::forward::{Choice, Model, Observation, route, routed_sum};
use crate::linalg::{exp, vectorised};
use crate::model::{Finite, LayerId, TensorSource};
use crate::par;
use crate::pipeline::activations::model::{EvalModel, ModelOutput, Sequences};
use crate::pipeline::evaluate::perplexity::{EvaluateOptions, Evaluation, summary};
use crate::stage::{Context, relative_error};

/// How far the routed experts of a layer are from the original ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerError {
    /// Which layer it is.
    pub layer: LayerId,
    /// `Σ‖y − y'‖² / Σ‖y‖²` of the outputs of the routed experts, shared ones excluded, both on the
    /// inputs that the original's layer gets: errors of earlier layers are not included.
    pub error: f64,
}

/// A checkpoint beside the original on the same text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The original.
    pub original: Evaluation,
    /// The other.
    pub other: Evaluation,
    /// Mean over the predicted tokens of `KL(p ‖ q) = Σ_v p(v) ln(p(v) / q(v))`, in nats; `p` are
    /// the original's predictions, `q` the other's.
    pub kl: f64,
    /// Share of the predicted tokens where both hold the same token for the most likely.
    pub agreement: f64,
    /// Layer by layer.
    pub layers: Vec<LayerError>,
}

impl Comparison {
    /// Indented JSON.
    ///
    /// # Errors
    /// [`Format`](crate::ErrorKind::Format) if it cannot be written.
    pub fn to_json(&self) -> Result<String> {
        crate::pipeline::json("comparison", self)
    }
}

/// Compares `other` with `original` on `text`, token by token and layer by layer.
///
/// The text is tokenised as the original's; otherwise as [`evaluate`](crate::pipeline::evaluate).
/// Both are run one after the other; one layer of each is in memory at a time, and the states of
/// all tokens.
///
/// # Errors
/// As [`evaluate`](crate::pipeline::evaluate); [`Shape`](crate::ErrorKind::Shape) when the two
/// differ in kind, vocabulary or MoE layers.
pub fn compare(
    original: &Path,
    other: &Path,
    text: &Path,
    options: &EvaluateOptions,
) -> Result<Comparison> {
    let (first, second) = (Checkpoint::open(original)?, Checkpoint::open(other)?);
    let cx = Context::cpu(options.seed);
    let (p, q) = (EvalModel::open(&first, &cx)?, EvalModel::open(&second, &cx)?);
    let (own, others) = (p.limits(), q.limits());
    same("vocabulary", own.vocab, others.vocab).in_file(other)?;
    same("encoder-decoder", p.model.switch().is_some(), q.model.switch().is_some())
        .in_file(other)?;
    let ids = |c: &Checkpoint| c.layers().iter().map(|l| l.id).collect::<Vec<_>>();
    same("MoE layers", ids(&first), ids(&second)).in_file(other)?;
    let limits = Limits { longest: own.longest.min(others.longest), ..own };
    let text = options.read(&p, text, limits)?;
    let items = p.items(&text, options.seed)?;

    let mut layers = Vec::new();
    let mut observe = |seen: &Observation<'_>| {
        let error = layer_error(&q, seen, &cx).in_layer(seen.id).in_file(other)?;
        layers.push(LayerError { layer: seen.id, error });
        Ok(())
    };
    let p_ran = p.run(&items, Some(&mut observe))?;
    let q_ran = q.run(&items, None)?;
    let tokens = predictions(&items, &p_ran, &q_ran, &cx)?;

    let all = || tokens.iter().flatten();
    let count = all().count().max(1) as f64;
    let sums = |pick: fn(&Token) -> f64| -> Vec<(f64, u64)> {
        tokens.iter().map(|w| (w.iter().map(pick).sum(), w.len() as u64)).collect()
    };
    Ok(Comparison {
        original: summary(&p, &items, &text, &sums(|t| t.p_nll)),
        other: summary(&q, &items, &text, &sums(|t| t.q_nll)),
        kl: all().map(|t| t.kl).sum::<f64>() / count,
        agreement: all().filter(|t| t.agree).count() as f64 / count,
        layers,
    })
}

fn same<T: PartialEq + std::fmt::Debug>(what: &'static str, original: T, other: T) -> Result<()> {
    if original == other { Ok(()) } else { Err(Error::shape(what, original, other)) }
}

/// The other's layer on the inputs of the original's.
fn layer_error(other: &EvalModel<'_>, seen: &Observation<'_>, cx: &Context) -> Result<f64> {
    let capacity = match &other.model {
        Model::Switch(model) => Some(model.spec().capacity),
        _ => None,
    };
    let layer = TensorSource::moe(other.checkpoint, seen.id)?;
    let routed = route(&layer, Choice::Mapped, seen.inputs, seen.windows, capacity, cx)?;
    let output = routed_sum(&layer.experts, &routed.visits, seen.inputs, cx)?;
    Ok(relative_error(output.view(), seen.output))
}

/// What both predict of one token.
struct Token {
    p_nll: f64,
    q_nll: f64,
    kl: f64,
    agree: bool,
}

/// Window by window; the logits of one are held at a time.
fn predictions(
    items: &Sequences,
    p: &ModelOutput,
    q: &ModelOutput,
    cx: &Context,
) -> Result<Vec<Vec<Token>>> {
    /// Logits of one model that are held at once.
    const HELD: usize = 1 << 24;
    let rows = (HELD / p.head.vocab().max(1)).clamp(1, 512);
    let mut windows = Vec::with_capacity(items.len());
    for w in 0..items.len() {
        let targets = items.targets(w);
        let (p_states, q_states) = (p.states(w, targets.len()), q.states(w, targets.len()));
        let mut tokens = Vec::with_capacity(targets.len());
        let blocks = p_states.axis_chunks_iter(Axis(0), rows);
        let blocks = blocks.zip(q_states.axis_chunks_iter(Axis(0), rows));
        for ((p_states, q_states), targets) in blocks.zip(targets.chunks(rows)) {
            let p_logits = p.head.logits(p_states, cx.compute())?;
            let q_logits = q.head.logits(q_states, cx.compute())?;
            p_logits.check_finite("logits of the original")?;
            q_logits.check_finite("logits of the other")?;
            tokens.extend(par::map(targets.len(), |i| {
                token(p_logits.row(i), q_logits.row(i), targets[i] as usize)
            })?);
        }
        windows.push(tokens);
    }
    Ok(windows)
}

/// Likelihoods and divergence of one token: one pass over the vocabulary for the largest logits,
/// one for the sums. Exponentials are those of [`exp`], of single precision; what they are
/// multiplied with, and sums, are in `f64`.
fn token(p: ArrayView1<'_, f32>, q: ArrayView1<'_, f32>, target: usize) -> Result<Token> {
    let (Some(p), Some(q)) = (p.to_slice(), q.to_slice()) else {
        return Err(Error::bug("logits of a token do not lie one behind the other"));
    };
    let (p_top, q_top) = (largest(p), largest(q));
    let sums = vectorised(
        #[inline(always)]
        || sums(p, p_top, q, q_top),
    );
    let log_norm = |top: f32, sum: f64| f64::from(top) + sum.ln();
    let (p_norm, q_norm) = (log_norm(p_top, sums.p), log_norm(q_top, sums.q));
    // Σ P (ln P − ln Q) with ln P = p − ‖p‖ and Σ P = 1.
    let kl = sums.difference / sums.p + (q_norm - p_norm);
    Ok(Token {
        p_nll: p_norm - f64::from(p[target]),
        q_nll: q_norm - f64::from(q[target]),
        kl: kl.max(0.0),
        agree: first(p, p_top) == first(q, q_top),
    })
}

/// Independent partial sums; their order is part of the result.
const LANES: usize = 16;

/// Sums over the vocabulary; exponents are relative to the largest logit of their model.
struct Sums {
    /// `Σ eᵖ`.
    p: f64,
    /// `Σ e^q`.
    q: f64,
    /// `Σ eᵖ (p − q)`.
    difference: f64,
}

#[inline(always)]
fn sums(p: &[f32], p_top: f32, q: &[f32], q_top: f32) -> Sums {
    let mut lanes = [[0.0f64; LANES]; 3];
    let ((p_blocks, p_rest), (q_blocks, q_rest)) = (p.as_chunks::<LANES>(), q.as_chunks::<LANES>());
    for (p, q) in p_blocks.iter().zip(q_blocks) {
        add(&mut lanes, p, p_top, q, q_top);
    }
    add(&mut lanes, p_rest, p_top, q_rest, q_top);
    let [p, q, difference] = lanes.map(|lanes| lanes.iter().sum());
    Sums { p, q, difference }
}

/// Adds the terms of a block, one a lane.
#[inline(always)]
fn add(lanes: &mut [[f64; LANES]; 3], p: &[f32], p_top: f32, q: &[f32], q_top: f32) {
    let [p_sums, q_sums, differences] = lanes;
    for (lane, (&p, &q)) in p.iter().zip(q).enumerate() {
        let p_exp = f64::from(exp(p - p_top));
        p_sums[lane] += p_exp;
        q_sums[lane] += f64::from(exp(q - q_top));
        differences[lane] += p_exp * (f64::from(p) - f64::from(q));
    }
}

/// The largest logit.
fn largest(z: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    vectorised(
        #[inline(always)]
        || {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let (blocks, rest) = z.as_chunks::<LANES>();
            for block in blocks {
                lanes.iter_mut().zip(block).for_each(|(lane, &z)| *lane = larger(*lane, z));
            }
            lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
        },
    )
}

/// The most likely token, the first of equals.
fn first(z: &[f32], top: f32) -> Option<usize> {
    z.iter().position(|&z| z == top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, array};

    #[test]
    fn divergence_of_two_coins() {
        let (p, q) = (array![0.75f32.ln(), 0.25f32.ln()], array![1.0f32, 1.0]);
        let found = token(p.view(), q.view(), 1).unwrap();
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((found.kl - expected).abs() < 1e-6 && found.agree);
        assert!((found.p_nll - 4f64.ln()).abs() < 1e-6 && (found.q_nll - 2f64.ln()).abs() < 1e-12);
        assert!(!token(q.view(), array![1.0f32, 2.0].view(), 0).unwrap().agree);
        assert_eq!(token(p.view(), p.view(), 0).unwrap().kl, 0.0);
    }

    #[test]
    fn a_vocabulary_of_many_words_has_the_sums_of_the_c_library() {
        // Neither a multiple of the lanes nor small; the second differs by a little.
        let p = Array1::from_shape_fn(1003, |i| ((i * 7919) % 1013) as f32 / 60.0 - 8.0);
        let q = Array1::from_shape_fn(1003, |i| p[i] + ((i * 31) % 17) as f32 / 500.0);
        let log_norm = |z: &Array1<f32>| z.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        let (p_norm, q_norm) = (log_norm(&p), log_norm(&q));
        let term = |(&p, &q): (&f32, &f32)| {
            let (p, q) = (f64::from(p) - p_norm, f64::from(q) - q_norm);
            p.exp() * (p - q)
        };
        let kl: f64 = p.iter().zip(&q).map(term).sum();
        let found = token(p.view(), q.view(), 7).unwrap();
        assert!((found.kl - kl).abs() < 1e-7, "{} {kl}", found.kl);
        assert!((found.p_nll - (p_norm - f64::from(p[7]))).abs() < 1e-7);
        assert!((found.q_nll - (q_norm - f64::from(q[7]))).abs() < 1e-7);
        // Of equal logits the first one counts.
        let (p, q) = (array![1.0f32, 3.0, 3.0], array![0.0f32, 0.0, 9.0]);
        assert!(!token(p.view(), q.view(), 0).unwrap().agree);
    }
}
