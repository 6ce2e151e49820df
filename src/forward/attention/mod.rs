//! Self-attention: projections of either kind, softmax attention, output projection.

mod cache;
mod grouped;
mod latent;
pub(crate) mod rope;
pub(crate) mod rotation;
pub(crate) mod softmax;

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use crate::error::Result;
use crate::forward::causal::{AttentionSpec, Spec};
use crate::forward::load::Loader;
use crate::linalg::Compute;
use crate::model::Linear;
use crate::stage::Context;
pub(crate) use cache::{Cache, SequenceCache};
use grouped::Grouped;
use latent::Latent;
use rotation::Rotation;
use softmax::{Heads, Mask, Span, attend};

/// The self-attention of one layer.
#[derive(Debug)]
pub(crate) struct Attention {
    project: Project,
    out: Linear,
    heads: Heads,
    mask: Mask,
}

#[derive(Debug)]
enum Project {
    Grouped(Grouped),
    Latent(Latent),
}

impl Attention {
    pub(crate) fn load(loader: &Loader<'_>, spec: &Spec, layer: usize) -> Result<Self> {
        let d = spec.d_model;
        let (project, heads, bias, window) = match &spec.attention {
            AttentionSpec::Grouped(s) => {
                let scale = 1.0 / (s.head_dim as f32).sqrt();
                let (d_key, d_value) = (s.head_dim, s.head_dim);
                let heads = Heads { heads: s.heads, kv_heads: s.kv_heads, d_key, d_value, scale };
                let window = s.windows.get(layer).copied().flatten();
                let project = Grouped::load(loader, s, d, spec.eps)?;
                (Project::Grouped(project), heads, s.out_bias, window)
            }
            AttentionSpec::Latent(s) => {
                let d_key = s.d_nope + s.d_rope;
                let scale = spec.rope.score_factor / (d_key as f32).sqrt();
                let (n, d_value) = (s.heads, s.d_value);
                let heads = Heads { heads: n, kv_heads: n, d_key, d_value, scale };
                (Project::Latent(Latent::load(loader, s, d)?), heads, s.bias, None)
            }
        };
        let out = loader.linear("o_proj", (d, heads.heads * heads.d_value), bias)?;
        Ok(Self { project, out, heads, mask: Mask::Causal { window } })
    }

    /// Attention within each window of `X: (t, d_model)`, after the norm: `(t, d_model)`.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        rotation: &Rotation,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let [q, k, v] = self.project(x, rotation, cx.compute())?;
        let span = |w: &Range<usize>| Span { queries: w.clone(), keys: w.clone() };
        let spans: Vec<Span> = windows.iter().map(span).collect();
        let qkv = [q.view(), k.view(), v.view()];
        let mixed = attend(qkv, &spans, self.heads, self.mask, None, cx)?;
        self.out.view().forward(mixed.view(), cx.compute())
    }

    /// Attention of the next tokens of one window to themselves and to those in the cache.
    pub(crate) fn step(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: &Rotation,
        cache: &mut Cache,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let [q, k, v] = self.project(x, rotation, cx.compute())?;
        let [k, v] = cache.extend([k, v])?;
        let spans = [Span { queries: 0..q.nrows(), keys: 0..k.nrows() }];
        let mixed = attend([q.view(), k, v], &spans, self.heads, self.mask, None, cx)?;
        self.out.view().forward(mixed.view(), cx.compute())
    }

    /// Attention of the next token of every sequence to itself and to what the cache holds of the
    /// same sequence.
    pub(crate) fn step_each(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: &Rotation,
        cache: &mut SequenceCache,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let [q, k, v] = self.project(x, rotation, cx.compute())?;
        cache.extend([k, v])?;
        let spans = cache.spans();
        let [k, v] = cache.views()?;
        let mixed = attend([q.view(), k, v], &spans, self.heads, self.mask, None, cx)?;
        self.out.view().forward(mixed.view(), cx.compute())
    }

    fn project(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: &Rotation,
        compute: &dyn Compute,
    ) -> Result<[Array2<f32>; 3]> {
        match &self.project {
            Project::Grouped(grouped) => grouped.forward(x, rotation, compute),
            Project::Latent(latent) => latent.forward(x, rotation, compute),
        }
    }
}
