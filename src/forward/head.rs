//! The end of a model: final norm, output projection, cross-entropy.

use ndarray::{Array2, ArrayView2, Axis, s};

use crate::error::{Error, Result};
use crate::families::DecoderSpec;
use crate::forward::load::Loader;
use crate::forward::math::log_sum_exp;
use crate::forward::norm::RmsNorm;
use crate::forward::windows::check_tokens;
use crate::linalg::Compute;
use crate::model::{Finite, TensorSource};
use crate::par;
use crate::stage::Context;

/// `logits = scale · W norm(h)` with `W: (vocab, d_model)`.
#[derive(Debug)]
pub struct Head {
    norm: RmsNorm,
    weight: Array2<f32>,
    scale: f32,
}

/// Logits that are held at once.
const HELD: usize = 1 << 24;

impl Head {
    pub(crate) fn new(norm: RmsNorm, weight: Array2<f32>, scale: f32) -> Self {
        Self { norm, weight, scale }
    }

    /// Reads norm and projection of a decoder-only model.
    pub(crate) fn load(source: &dyn TensorSource, spec: &DecoderSpec) -> Result<Self> {
        let inner = Loader::new(source, source.prefix());
        let norm = inner.norm("norm", spec.d_model, spec.norm)?;
        // The projection lives beside the decoder, under the outer part of a wrapper's prefix.
        let outer = source.prefix().strip_suffix("model.").unwrap_or("");
        let shape = (spec.vocab, spec.d_model);
        let outer_name = format!("{outer}lm_head.weight");
        let name = if source.has(&outer_name) { &outer_name } else { "lm_head.weight" };
        let weight = if spec.tied {
            inner.matrix("embed_tokens.weight", shape)?
        } else {
            Loader::new(source, "").matrix(name, shape)?
        };
        Ok(Self::new(norm, weight, 1.0))
    }

    /// Number of token ids.
    pub fn vocab(&self) -> usize {
        self.weight.nrows()
    }

    /// Rows whose logits may be held at once.
    pub(super) fn rows_at_once(&self) -> usize {
        (HELD / self.vocab().max(1)).clamp(1, 1024)
    }

    /// Logits of every row of `hidden: (t, d_model)`: `(t, vocab)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `hidden` has another width.
    pub fn logits(
        &self,
        hidden: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<Array2<f32>> {
        let x = self.norm.forward(hidden)?;
        let mut logits = Array2::zeros((hidden.nrows(), self.vocab()));
        compute.gemm(self.scale, x.view(), self.weight.t(), 0.0, logits.view_mut())?;
        Ok(logits)
    }

    /// The most likely token after the only row of `hidden`; ties go to the smaller id.
    pub(crate) fn largest(&self, hidden: ArrayView2<'_, f32>, cx: &Context) -> Result<u32> {
        let logits = self.logits(hidden, cx.compute())?;
        logits.check_finite("logits")?;
        let better = |best: (u32, f32), (i, &z): (usize, &f32)| {
            if z > best.1 { (i as u32, z) } else { best }
        };
        Ok(logits.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0)
    }

    /// `−ln softmax(logits)[target]` of every row, in nats; a block of logits is held at a time.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when there is not one target per row,
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a target that is no token id.
    pub fn nll(
        &self,
        hidden: ArrayView2<'_, f32>,
        targets: &[u32],
        cx: &Context,
    ) -> Result<Vec<f64>> {
        if targets.len() != hidden.nrows() {
            return Err(Error::shape("targets", hidden.nrows(), targets.len()));
        }
        check_tokens(targets, self.vocab())?;
        let rows = self.rows_at_once();
        let mut all = Vec::with_capacity(targets.len());
        for (hidden, targets) in hidden.axis_chunks_iter(Axis(0), rows).zip(targets.chunks(rows)) {
            let logits = self.logits(hidden, cx.compute())?;
            let row = |i: usize| {
                let row = logits.slice(s![i, ..]);
                let bug = || Error::bug("logits of a token are not in memory order");
                let values = row.to_slice().ok_or_else(bug)?;
                Ok(log_sum_exp(values) - f64::from(row[targets[i] as usize]))
            };
            all.extend(par::map(targets.len(), row)?);
        }
        Ok(all)
    }
}
