//! What a merged checkpoint predicts otherwise than the original.

use std::path::Path;

use ndarray::{ArrayView1, Axis};
use serde::{Deserialize, Serialize};

use crate::calibrate::text::Limits;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Locate, Result};
use crate::forward::{Choice, Model, Observation, route, routed_sum};
use crate::model::{Finite, LayerId, TensorSource};
use crate::par;
use crate::pipeline::evaluate::model::{Items, Ran, Subject};
use crate::pipeline::evaluate::perplexity::{EvaluateOptions, Evaluation, summary};
use crate::pipeline::layer::process::relative_error;
use crate::stage::Context;

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
    let (p, q) = (Subject::open(&first, &cx)?, Subject::open(&second, &cx)?);
    let (own, others) = (p.limits(), q.limits());
    same("vocabulary", own.vocab, others.vocab).in_file(other)?;
    same("encoder-decoder", p.model.switch().is_some(), q.model.switch().is_some())
        .in_file(other)?;
    let ids = |c: &Checkpoint| c.layers().iter().map(|l| l.id).collect::<Vec<_>>();
    same("MoE layers", ids(&first), ids(&second)).in_file(other)?;
    let limits = Limits { longest: own.longest.min(others.longest), ..own };
    let text = p.text(text, limits, options)?;
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
fn layer_error(other: &Subject<'_>, seen: &Observation<'_>, cx: &Context) -> Result<f64> {
    let capacity = match &other.model {
        Model::Switch(model) => Some(model.spec().capacity),
        _ => None,
    };
    let layer = TensorSource::moe(other.checkpoint, seen.id)?;
    let routed = route(&layer, Choice::Mapped, seen.inputs, seen.windows, capacity, cx)?;
    let output = routed_sum(&layer.experts, &routed.visits, seen.inputs, cx)?;
    Ok(relative_error(seen.output, output.view()))
}

/// What both predict of one token.
struct Token {
    p_nll: f64,
    q_nll: f64,
    kl: f64,
    agree: bool,
}

/// Window by window; the logits of one are held at a time.
fn predictions(items: &Items, p: &Ran, q: &Ran, cx: &Context) -> Result<Vec<Vec<Token>>> {
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
                Ok(token(p_logits.row(i), q_logits.row(i), targets[i] as usize))
            })?);
        }
        windows.push(tokens);
    }
    Ok(windows)
}

fn token(p: ArrayView1<'_, f32>, q: ArrayView1<'_, f32>, target: usize) -> Token {
    let ((p_best, p_norm), (q_best, q_norm)) = (normaliser(p), normaliser(q));
    let log = |z: f32, norm: f64| f64::from(z) - norm;
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (log(p, p_norm), log(q, q_norm));
        p.exp() * (p - q)
    };
    Token {
        p_nll: -log(p[target], p_norm),
        q_nll: -log(q[target], q_norm),
        kl: p.iter().zip(q).map(term).sum::<f64>().max(0.0),
        agree: p_best == q_best,
    }
}

/// The most likely token, the first of equals, and `ln Σ exp(z)`.
fn normaliser(z: ArrayView1<'_, f32>) -> (usize, f64) {
    let better =
        |best: (usize, f32), (i, &z): (usize, &f32)| if z > best.1 { (i, z) } else { best };
    let (best, largest) = z.iter().enumerate().fold((0, f32::NEG_INFINITY), better);
    let largest = f64::from(largest);
    let sum: f64 = z.iter().map(|&z| (f64::from(z) - largest).exp()).sum();
    (best, largest + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn divergence_of_two_coins() {
        let (p, q) = (array![0.75f32.ln(), 0.25f32.ln()], array![1.0f32, 1.0]);
        let found = token(p.view(), q.view(), 1);
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((found.kl - expected).abs() < 1e-6 && found.agree);
        assert!((found.p_nll - 4f64.ln()).abs() < 1e-6 && (found.q_nll - 2f64.ln()).abs() < 1e-12);
        assert!(!token(q.view(), array![1.0f32, 2.0].view(), 0).agree);
        assert_eq!(token(p.view(), p.view(), 0).kl, 0.0);
    }
}
