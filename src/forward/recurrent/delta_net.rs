//! Gated delta net (Qwen3-Next, Qwen3.5-MoE): projections, a short convolution, the gated delta
//! rule for each head, and a norm that a gate follows.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, s};

use super::convolution::Convolution;
use super::delta_rule::{CHUNK, HeadTokens, delta_rule};
use crate::error::{Error, Result};
use crate::families::{DeltaNetSpec, NormKind, NormSpec};
use crate::forward::load::Loader;
use crate::forward::math::{sigmoid, sum_squares};
use crate::forward::norm::RmsNorm;
use crate::linalg::activate;
use crate::model::{Activation, Linear};
use crate::par;
use crate::stage::Context;

/// `ε` under the root of the norms of queries and keys, as in the reference kernels.
const QK_EPS: f32 = 1e-6;

/// The gated delta net of one layer.
#[derive(Debug)]
pub(crate) struct DeltaNet {
    spec: DeltaNetSpec,
    /// To queries, keys and values: `(2 heads_k · d_key + heads_v · d_value, d_model)`.
    qkv: Linear,
    /// To the gate of the output.
    z: Linear,
    /// To the strengths, one row a value head.
    b: Linear,
    /// To the decays, likewise.
    a: Linear,
    convolution: Convolution,
    activation: Activation,
    /// `e^A` of each value head.
    rate: Array1<f32>,
    /// Bias of the decays.
    dt_bias: Array1<f32>,
    norm: RmsNorm,
    out: Linear,
}

/// What a layer keeps of the tokens of one window that were already seen.
#[derive(Debug, Clone)]
pub(crate) struct DeltaState {
    /// The last inputs of the convolution.
    tail: Array2<f32>,
    /// `(d_key, d_value)` of each value head.
    heads: Vec<Array2<f32>>,
}

impl DeltaNet {
    /// Reads the projections, which lie together or apart.
    pub(crate) fn load(
        loader: &Loader<'_>,
        spec: &DeltaNetSpec,
        d: usize,
        eps: f32,
        activation: Activation,
    ) -> Result<Self> {
        let (values, heads) = (spec.value_heads * spec.d_value, spec.value_heads);
        let channels = spec.channels();
        let (qkv, z, b, a) = if spec.together {
            together(loader, spec, d)?
        } else {
            let linear = |name: &str, rows| loader.linear(name, (rows, d), false);
            (
                linear("in_proj_qkv", channels)?,
                linear("in_proj_z", values)?,
                linear("in_proj_b", heads)?,
                linear("in_proj_a", heads)?,
            )
        };
        let kernel = loader.matrix("conv1d.weight", (channels, spec.kernel))?;
        let plain = NormSpec { kind: NormKind::Rms, eps };
        Ok(Self {
            qkv,
            z,
            b,
            a,
            convolution: Convolution::new(kernel.view()),
            activation,
            rate: loader.vector("A_log", heads)?.mapv(f32::exp),
            dt_bias: loader.vector("dt_bias", heads)?,
            norm: loader.norm("norm", spec.d_value, plain)?,
            out: loader.linear("out_proj", (d, values), false)?,
            spec: spec.clone(),
        })
    }

    /// What is kept before the first token.
    pub(crate) fn start(&self) -> DeltaState {
        let DeltaNetSpec { value_heads, d_key, d_value, .. } = self.spec;
        let tail = Array2::zeros((0, self.spec.channels()));
        DeltaState { tail, heads: vec![Array2::zeros((d_key, d_value)); value_heads] }
    }

    /// Mixes the tokens of each window of `X: (t, d_model)`: `(t, d_model)`.
    pub(crate) fn forward(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let qkv = self.qkv.view().forward(x, cx.compute())?;
        let qkv = self.convolution.forward(qkv.view(), windows)?;
        let mut states: Vec<_> = windows.iter().flat_map(|_| self.start().heads).collect();
        self.heads(x, qkv, windows, &mut states, cx)
    }

    /// The next tokens of one window.
    pub(crate) fn step(
        &self,
        x: ArrayView2<'_, f32>,
        state: &mut DeltaState,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let all = 0..x.nrows();
        self.step_pieces(x, std::slice::from_ref(&all), std::slice::from_mut(state), cx)
    }

    /// The next token of every sequence, one row and one state each.
    pub(crate) fn step_each(
        &self,
        x: ArrayView2<'_, f32>,
        states: &mut [DeltaState],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let rows: Vec<_> = (0..x.nrows()).map(|i| i..i + 1).collect();
        self.step_pieces(x, &rows, states, cx)
    }

    /// The next rows of several sequences, each with its state.
    fn step_pieces(
        &self,
        x: ArrayView2<'_, f32>,
        pieces: &[Range<usize>],
        states: &mut [DeltaState],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        if pieces.len() != states.len() {
            return Err(Error::shape("states of sequences", pieces.len(), states.len()));
        }
        let mut qkv = self.qkv.view().forward(x, cx.compute())?;
        for (piece, state) in pieces.iter().zip(&mut *states) {
            let mut rows = qkv.slice_mut(s![piece.clone(), ..]);
            let convolved = self.convolution.step(rows.view(), &mut state.tail)?;
            rows.assign(&convolved);
        }
        let mut heads: Vec<_> =
            states.iter_mut().flat_map(|state| std::mem::take(&mut state.heads)).collect();
        let out = self.heads(x, qkv, pieces, &mut heads, cx);
        let mut heads = heads.into_iter();
        for state in states {
            state.heads = heads.by_ref().take(self.spec.value_heads).collect();
        }
        out
    }

    /// From the convolution to the output; `states` by window, then by value head.
    fn heads(
        &self,
        x: ArrayView2<'_, f32>,
        mut qkv: Array2<f32>,
        windows: &[Range<usize>],
        states: &mut [Array2<f32>],
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let DeltaNetSpec { key_heads, value_heads, d_key, d_value, .. } = self.spec;
        let compute = cx.compute();
        let channels = qkv.ncols();
        let Some(values) = qkv.as_slice_mut() else {
            return Err(Error::bug("outputs of a convolution are not in memory order"));
        };
        activate(self.activation, values);
        let scale = 1.0 / (d_key as f32).sqrt();
        for row in values.chunks_exact_mut(channels) {
            let (q, rest) = row.split_at_mut(key_heads * d_key);
            q.chunks_exact_mut(d_key).for_each(|q| normalise(q, scale));
            rest[..key_heads * d_key].chunks_exact_mut(d_key).for_each(|k| normalise(k, 1.0));
        }
        let b = self.b.view().forward(x, compute)?.mapv(sigmoid);
        let mut g = self.a.view().forward(x, compute)?;
        for mut row in g.rows_mut() {
            for ((g, bias), rate) in row.iter_mut().zip(&self.dt_bias).zip(&self.rate) {
                *g = -rate * softplus(*g + bias);
            }
        }
        let single = cx.per_task();
        let parts = par::map(states.len(), |task| {
            let (rows, head) = (windows[task / value_heads].clone(), task % value_heads);
            let shared = head / (value_heads / key_heads.max(1)).max(1);
            let columns = |start: usize, width: usize| {
                qkv.slice(s![rows.clone(), start..start + width]).as_standard_layout().into_owned()
            };
            let q = columns(shared * d_key, d_key);
            let k = columns((key_heads + shared) * d_key, d_key);
            let v = columns(2 * key_heads * d_key + head * d_value, d_value);
            let tokens = HeadTokens {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                g: g.slice(s![rows.clone(), head]),
                b: b.slice(s![rows.clone(), head]),
            };
            let mut state = states[task].clone();
            let out = delta_rule(tokens, CHUNK, &mut state, single.compute())?;
            Ok((out, state))
        })?;
        let mut mixed = Array2::zeros((x.nrows(), value_heads * d_value));
        for (task, (out, state)) in parts.into_iter().enumerate() {
            let (rows, head) = (windows[task / value_heads].clone(), task % value_heads);
            mixed.slice_mut(s![rows, head * d_value..(head + 1) * d_value]).assign(&out);
            states[task] = state;
        }
        self.norm.in_place(&mut mixed)?;
        let mut z = self.z.view().forward(x, compute)?;
        let Some(gates) = z.as_slice_mut() else {
            return Err(Error::bug("gates of a delta net are not in memory order"));
        };
        activate(Activation::Silu, gates);
        mixed *= &z;
        self.out.view().forward(mixed.view(), compute)
    }
}

/// `x ← scale · x / sqrt(Σ x² + ε)`.
fn normalise(x: &mut [f32], scale: f32) {
    let factor = scale / (sum_squares(x) + QK_EPS).sqrt();
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `ln(1 + eˣ)`.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { f64::from(x).exp().ln_1p() as f32 }
}

/// `in_proj_qkvz` and `in_proj_ba`, whose rows lie by key head: query, key, values and gates of its
/// value heads; strengths, then decays. Returns them apart, as the other spelling stores them.
fn together(
    loader: &Loader<'_>,
    spec: &DeltaNetSpec,
    d: usize,
) -> Result<(Linear, Linear, Linear, Linear)> {
    let DeltaNetSpec { key_heads, value_heads, d_key, d_value, .. } = *spec;
    let (each, values) = (value_heads / key_heads, value_heads * d_value);
    let per_head = 2 * d_key + 2 * each * d_value;
    let qkvz = loader.matrix("in_proj_qkvz.weight", (key_heads * per_head, d))?;
    let ba = loader.matrix("in_proj_ba.weight", (2 * value_heads, d))?;
    let mut qkv = Array2::zeros((spec.channels(), d));
    let mut z = Array2::zeros((values, d));
    let (mut b, mut a) = (Array2::zeros((value_heads, d)), Array2::zeros((value_heads, d)));
    for head in 0..key_heads {
        let mut from = head * per_head;
        let mut take = |target: &mut Array2<f32>, to: usize, rows: usize| {
            let source = qkvz.slice(s![from..from + rows, ..]);
            target.slice_mut(s![to..to + rows, ..]).assign(&source);
            from += rows;
        };
        take(&mut qkv, head * d_key, d_key);
        take(&mut qkv, (key_heads + head) * d_key, d_key);
        take(&mut qkv, 2 * key_heads * d_key + head * each * d_value, each * d_value);
        take(&mut z, head * each * d_value, each * d_value);
        let (from, to) = (2 * head * each, head * each);
        b.slice_mut(s![to..to + each, ..]).assign(&ba.slice(s![from..from + each, ..]));
        a.slice_mut(s![to..to + each, ..]).assign(&ba.slice(s![from + each..from + 2 * each, ..]));
    }
    Ok((Linear::new(qkv), Linear::new(z), Linear::new(b), Linear::new(a)))
}
