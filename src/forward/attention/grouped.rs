//! Queries, keys and values of grouped-query attention.

use ndarray::{Array2, ArrayView2, Axis};

use super::rotation::Rotation;
use crate::error::Result;
use crate::families::{GroupedSpec, NormSpec, QkNorm};
use crate::forward::load::Loader;
use crate::forward::norm::RmsNorm;
use crate::linalg::Compute;
use crate::model::Linear;

/// `q, k, v = W x + b`, norm, clip, rotation.
#[derive(Debug)]
pub(crate) struct Grouped {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: Option<[RmsNorm; 2]>,
    clip: Option<f32>,
    head_dim: usize,
}

impl Grouped {
    /// Reads the projections, and that to the gate of the heads' outputs, if there is one.
    pub(crate) fn load(
        loader: &Loader<'_>,
        s: &GroupedSpec,
        d: usize,
        norm: NormSpec,
    ) -> Result<(Self, Option<Linear>)> {
        let (wide, narrow) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let norms = match s.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([s.head_dim; 2]),
            QkNorm::Whole => Some([wide, narrow]),
        };
        let load = |[q, k]: [usize; 2]| -> Result<[RmsNorm; 2]> {
            Ok([loader.norm("q_norm", q, norm)?, loader.norm("k_norm", k, norm)?])
        };
        let (q, gate) = if s.gated {
            let both = loader.linear("q_proj", (2 * wide, d), s.qkv_bias)?;
            let [q, gate] = [0, 1].map(|half| half_of_heads(&both, s, half));
            (q, Some(gate))
        } else {
            (loader.linear("q_proj", (wide, d), s.qkv_bias)?, None)
        };
        let grouped = Self {
            q,
            k: loader.linear("k_proj", (narrow, d), s.qkv_bias)?,
            v: loader.linear("v_proj", (narrow, d), s.qkv_bias)?,
            norms: norms.map(load).transpose()?,
            clip: s.clip,
            head_dim: s.head_dim,
        };
        Ok((grouped, gate))
    }

    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: Option<&Rotation>,
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
        if let Some(rotation) = rotation {
            rotation.apply(&mut q, self.head_dim, 0)?;
            rotation.apply(&mut k, self.head_dim, 0)?;
        }
        Ok([q, k, v])
    }
}

/// Of a projection whose rows hold two halves of each head in turn, one half.
fn half_of_heads(both: &Linear, s: &GroupedSpec, half: usize) -> Linear {
    let start = |head: usize| (2 * head + half) * s.head_dim;
    let rows: Vec<usize> = (0..s.heads).flat_map(|h| start(h)..start(h) + s.head_dim).collect();
    Linear {
        weight: both.weight.select(Axis(0), &rows),
        bias: both.bias.as_ref().map(|bias| bias.select(Axis(0), &rows)),
    }
}
