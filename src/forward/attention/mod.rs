//! Self-attention: projections of either kind, softmax attention, output projection.

mod cache;
mod grouped;
mod latent;
mod rotation;
pub(crate) mod softmax;

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2};

use crate::error::Result;
use crate::families::{GroupedSpec, LatentSpec, NormSpec, Rope};
use crate::forward::load::Loader;
use crate::forward::math::sigmoid;
use crate::linalg::Compute;
use crate::model::Linear;
use crate::stage::Context;
pub(crate) use cache::{Cache, SequenceCache};
use grouped::Grouped;
use latent::Latent;
use rotation::Rotation;
use softmax::{Heads, Mask, Span, Terms, attend};

/// The self-attention of one layer.
#[derive(Debug)]
pub(crate) struct Attention {
    project: Project,
    rope: Option<Rope>,
    out: Linear,
    heads: Heads,
    mask: Mask,
    /// Projection to the gate of the heads' outputs.
    gate: Option<Linear>,
    /// Logits of the sinks.
    sinks: Option<Array1<f32>>,
}

#[derive(Debug)]
enum Project {
    Grouped(Box<Grouped>),
    Latent(Box<Latent>),
}

impl Attention {
    /// Reads attention with grouped queries.
    pub(crate) fn grouped(
        loader: &Loader<'_>,
        s: &GroupedSpec,
        d: usize,
        norm: NormSpec,
    ) -> Result<Self> {
        let scale = 1.0 / (s.head_dim as f32).sqrt();
        let (d_key, d_value) = (s.head_dim, s.head_dim);
        let (grouped, gate) = Grouped::load(loader, s, d, norm)?;
        Ok(Self {
            project: Project::Grouped(grouped.into()),
            gate,
            sinks: s.sinks.then(|| loader.vector("sinks", s.heads)).transpose()?,
            rope: s.rope.clone(),
            out: loader.linear("o_proj", (d, s.heads * d_value), s.out_bias)?,
            heads: Heads { heads: s.heads, kv_heads: s.kv_heads, d_key, d_value, scale },
            mask: Mask::Causal { window: s.window },
        })
    }

    /// Reads attention with latent keys and values.
    pub(crate) fn latent(loader: &Loader<'_>, s: &LatentSpec, d: usize) -> Result<Self> {
        let d_key = s.d_nope + s.d_rope;
        let scale = s.rope.score_factor / (d_key as f32).sqrt();
        let (heads, d_value) = (s.heads, s.d_value);
        Ok(Self {
            project: Project::Latent(Latent::load(loader, s, d)?.into()),
            gate: None,
            sinks: None,
            rope: Some(s.rope.clone()),
            out: loader.linear("o_proj", (d, heads * d_value), s.bias)?,
            heads: Heads { heads, kv_heads: heads, d_key, d_value, scale },
            mask: Mask::Causal { window: None },
        })
    }

    /// Attention within each window of `X: (t, d_model)`, after the norm: `(t, d_model)`.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let fresh: Vec<_> = windows.iter().map(|w| (w.clone(), 0)).collect();
        let [q, k, v] = self.project(x, &fresh, cx.compute())?;
        let span = |w: &Range<usize>| Span { queries: w.clone(), keys: w.clone() };
        let spans: Vec<Span> = windows.iter().map(span).collect();
        let qkv = [q.view(), k.view(), v.view()];
        let mixed = attend(qkv, &spans, self.heads, self.mask, self.terms(), cx)?;
        self.finish(x, mixed, cx.compute())
    }

    /// Attention of the next tokens of one window to themselves and to those in the cache.
    pub(crate) fn step(
        &self,
        x: ArrayView2<'_, f32>,
        cache: &mut Cache,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let [q, k, v] = self.project(x, &[(0..x.nrows(), cache.len())], cx.compute())?;
        let [k, v] = cache.extend([k, v])?;
        let spans = [Span { queries: 0..q.nrows(), keys: 0..k.nrows() }];
        let qkv = [q.view(), k, v];
        let mixed = attend(qkv, &spans, self.heads, self.mask, self.terms(), cx)?;
        self.finish(x, mixed, cx.compute())
    }

    fn terms(&self) -> Terms<'_> {
        Terms { bias: None, sinks: self.sinks.as_ref().map(|sinks| sinks.view()) }
    }

    /// The gate, if there is one, and the output projection.
    fn finish(
        &self,
        x: ArrayView2<'_, f32>,
        mut mixed: Array2<f32>,
        compute: &dyn Compute,
    ) -> Result<Array2<f32>> {
        if let Some(gate) = &self.gate {
            mixed *= &gate.view().forward(x, compute)?.mapv(sigmoid);
        }
        self.out.view().forward(mixed.view(), compute)
    }

    /// Attention of the next token of every sequence to itself and to what the cache holds of the
    /// same sequence.
    pub(crate) fn step_each(
        &self,
        x: ArrayView2<'_, f32>,
        cache: &mut SequenceCache,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let pieces: Vec<_> = (0..x.nrows()).map(|i| (i..i + 1, cache.len())).collect();
        let [q, k, v] = self.project(x, &pieces, cx.compute())?;
        cache.extend([k, v])?;
        let spans = cache.spans();
        let [k, v] = cache.views()?;
        let qkv = [q.view(), k, v];
        let mixed = attend(qkv, &spans, self.heads, self.mask, self.terms(), cx)?;
        self.finish(x, mixed, cx.compute())
    }

    /// Queries, keys and values of pieces of windows, each with the number of tokens before it.
    fn project(
        &self,
        x: ArrayView2<'_, f32>,
        pieces: &[(Range<usize>, usize)],
        compute: &dyn Compute,
    ) -> Result<[Array2<f32>; 3]> {
        let rotation = self.rope.as_ref().map(|rope| Rotation::new(rope, pieces));
        match &self.project {
            Project::Grouped(grouped) => grouped.forward(x, rotation.as_ref(), compute),
            Project::Latent(latent) => latent.forward(x, rotation.as_ref(), compute),
        }
    }
}
