//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1): queries, and keys and values
//! together, pass through low-rank latents; a rotated part of the key is common to all heads.

use ndarray::{Array2, ArrayView2, s};

use super::rotation::Rotation;
use crate::error::Result;
use crate::families::{LatentSpec, NormKind, NormSpec};
use crate::forward::load::Loader;
use crate::forward::norm::RmsNorm;
use crate::linalg::Compute;
use crate::model::Linear;

/// `ε` of the norms of the latents: the class default, not `rms_norm_eps`.
const LATENT_NORM: NormSpec = NormSpec { kind: NormKind::Rms, eps: 1e-6 };

/// The projections of one layer.
#[derive(Debug)]
pub(crate) struct Latent {
    query: Query,
    kv_down: Linear,
    kv_norm: RmsNorm,
    kv_up: Linear,
    spec: LatentSpec,
}

#[derive(Debug)]
enum Query {
    Full(Linear),
    LowRank { down: Linear, norm: RmsNorm, up: Linear },
}

impl Latent {
    pub(crate) fn load(loader: &Loader<'_>, spec: &LatentSpec, d: usize) -> Result<Self> {
        let s = spec;
        let wide = s.heads * (s.d_nope + s.d_rope);
        let query = match s.q_rank {
            None => Query::Full(loader.linear("q_proj", (wide, d), false)?),
            Some(rank) => Query::LowRank {
                down: loader.linear("q_a_proj", (rank, d), s.bias)?,
                norm: loader.norm("q_a_layernorm", rank, LATENT_NORM)?,
                up: loader.linear("q_b_proj", (wide, rank), false)?,
            },
        };
        let latent = (s.kv_rank + s.d_rope, d);
        let expanded = (s.heads * (s.d_nope + s.d_value), s.kv_rank);
        Ok(Self {
            query,
            kv_down: loader.linear("kv_a_proj_with_mqa", latent, s.bias)?,
            kv_norm: loader.norm("kv_a_layernorm", s.kv_rank, LATENT_NORM)?,
            kv_up: loader.linear("kv_b_proj", expanded, false)?,
            spec: spec.clone(),
        })
    }

    /// Queries and keys `(t, heads · (d_nope + d_rope))`, values `(t, heads · d_value)`.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        rotation: Option<&Rotation>,
        compute: &dyn Compute,
    ) -> Result<[Array2<f32>; 3]> {
        let LatentSpec { heads, kv_rank, d_nope, d_rope, d_value, .. } = self.spec;
        let mut q = match &self.query {
            Query::Full(full) => full.view().forward(x, compute)?,
            Query::LowRank { down, norm, up } => {
                let latent = norm.forward(down.view().forward(x, compute)?.view())?;
                up.view().forward(latent.view(), compute)?
            }
        };
        if let Some(rotation) = rotation {
            rotation.apply(&mut q, d_nope + d_rope, d_nope)?;
        }

        let down = self.kv_down.view().forward(x, compute)?;
        let mut rotated = down.slice(s![.., kv_rank..]).to_owned();
        if let Some(rotation) = rotation {
            rotation.apply(&mut rotated, d_rope, 0)?;
        }
        let latent = self.kv_norm.forward(down.slice(s![.., ..kv_rank]))?;
        let up = self.kv_up.view().forward(latent.view(), compute)?;

        let mut k = Array2::zeros((x.nrows(), heads * (d_nope + d_rope)));
        let mut v = Array2::zeros((x.nrows(), heads * d_value));
        for h in 0..heads {
            let (from, to) = (h * (d_nope + d_value), h * (d_nope + d_rope));
            k.slice_mut(s![.., to..to + d_nope]).assign(&up.slice(s![.., from..from + d_nope]));
            k.slice_mut(s![.., to + d_nope..to + d_nope + d_rope]).assign(&rotated);
            let value = up.slice(s![.., from + d_nope..from + d_nope + d_value]);
            v.slice_mut(s![.., h * d_value..(h + 1) * d_value]).assign(&value);
        }
        Ok([q, k, v])
    }
}
