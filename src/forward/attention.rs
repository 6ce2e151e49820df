//! Grouped-query attention, and what both kinds of attention share: output projection and cache.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, concatenate};

use super::attend::{Heads, Mask, Span, attend};
use super::load::Loader;
use super::mla::Latent;
use super::norm::RmsNorm;
use super::rotation::{Pairing, Rotation};
use super::spec::{AttentionSpec, GroupedSpec, QkNorm, Spec};
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::Linear;
use crate::stage::Context;

/// The self-attention of one layer.
#[derive(Debug)]
pub(super) struct Attention {
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

/// Keys and values of the tokens of one window that were already seen, in one layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Cache {
    keys_values: Option<[Array2<f32>; 2]>,
}

impl Cache {
    /// Number of tokens held.
    pub(super) fn len(&self) -> usize {
        self.keys_values.as_ref().map_or(0, |[k, _]| k.nrows())
    }

    /// Appends new rows and returns all of them.
    fn extend(&mut self, [k, v]: [Array2<f32>; 2]) -> Result<[ArrayView2<'_, f32>; 2]> {
        let joined = match self.keys_values.take() {
            None => [k, v],
            Some([past_k, past_v]) => [join(&past_k, &k)?, join(&past_v, &v)?],
        };
        let [k, v] = self.keys_values.insert(joined);
        Ok([k.view(), v.view()])
    }
}

fn join(a: &Array2<f32>, b: &Array2<f32>) -> Result<Array2<f32>> {
    concatenate(Axis(0), &[a.view(), b.view()])
        .map_err(|_| Error::shape("key-value cache", a.ncols(), b.ncols()))
}

impl Attention {
    pub(super) fn load(loader: &Loader<'_>, spec: &Spec, layer: usize) -> Result<Self> {
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
    pub(super) fn forward(
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
    pub(super) fn step(
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

/// `q, k, v = W x + b`, norm, clip, rotation.
#[derive(Debug)]
struct Grouped {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: Option<[RmsNorm; 2]>,
    clip: Option<f32>,
    head_dim: usize,
    pairing: Pairing,
}

impl Grouped {
    fn load(loader: &Loader<'_>, s: &GroupedSpec, d: usize, eps: f32) -> Result<Self> {
        let (wide, narrow) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let norms = match s.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([s.head_dim; 2]),
            QkNorm::Whole => Some([wide, narrow]),
        };
        let norm = |[q, k]: [usize; 2]| -> Result<[RmsNorm; 2]> {
            Ok([loader.norm("q_norm", q, eps)?, loader.norm("k_norm", k, eps)?])
        };
        Ok(Self {
            q: loader.linear("q_proj", (wide, d), s.qkv_bias)?,
            k: loader.linear("k_proj", (narrow, d), s.qkv_bias)?,
            v: loader.linear("v_proj", (narrow, d), s.qkv_bias)?,
            norms: norms.map(norm).transpose()?,
            clip: s.clip,
            head_dim: s.head_dim,
            pairing: s.pairing,
        })
    }

    fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: &Rotation,
        compute: &dyn Compute,
    ) -> Result<[Array2<f32>; 3]> {
        let mut q = self.q.view().forward(x, compute)?;
        let mut k = self.k.view().forward(x, compute)?;
        let mut v = self.v.view().forward(x, compute)?;
        if let Some([q_norm, k_norm]) = &self.norms {
            q_norm.in_place(&mut q)?;
            k_norm.in_place(&mut k)?;
        }
        if let Some(clip) = self.clip {
            for x in [&mut q, &mut k, &mut v] {
                x.mapv_inplace(|x| x.clamp(-clip.abs(), clip.abs()));
            }
        }
        rotation.apply(&mut q, self.head_dim, 0, self.pairing)?;
        rotation.apply(&mut k, self.head_dim, 0, self.pairing)?;
        Ok([q, k, v])
    }
}
