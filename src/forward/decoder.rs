//! One decoder layer, in two halves: attention, then dense MLP or experts.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use super::attention::{Attention, Cache};
use super::dense::{Shared, add_expert};
use super::load::Loader;
use super::moe::{Choice, Routed, route, routed_sum};
use super::norm::RmsNorm;
use super::rope::Rope;
use super::spec::Spec;
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, LayerId, MergedLayer, TensorSource};
use crate::stage::Context;

/// What a pass shows of a sparse layer, for all windows at once.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// Which layer it is.
    pub id: LayerId,
    /// The layer: its experts and routers.
    pub layer: &'a MergedLayer,
    /// Rows of each window.
    pub windows: &'a [Range<usize>],
    /// `(t, d_model)` inputs of the MoE block, after the layer norm.
    pub inputs: ArrayView2<'a, f32>,
    /// Logits, choices, weights and visits.
    pub routed: &'a Routed,
    /// `(t, d_model)` outputs of the routed experts; shared experts are not included.
    pub output: ArrayView2<'a, f32>,
}

/// Looks at the sparse layers of a pass, in order.
pub trait Observer {
    /// Called once per sparse layer.
    ///
    /// # Errors
    /// The observer's own; they end the pass.
    fn observe(&mut self, seen: &Observation<'_>) -> Result<()>;
}

impl<F: FnMut(&Observation<'_>) -> Result<()>> Observer for F {
    fn observe(&mut self, seen: &Observation<'_>) -> Result<()> {
        self(seen)
    }
}

/// What follows the attention.
#[derive(Debug)]
pub enum Mlp {
    /// One MLP for all tokens.
    Dense(Box<Expert>),
    /// Routed experts and, in some families, a shared one.
    Sparse {
        /// The routed experts.
        layer: Box<MergedLayer>,
        /// The shared expert.
        shared: Option<Box<Shared>>,
        /// Tokens per window that an expert takes (Switch).
        capacity: Option<usize>,
    },
}

impl Mlp {
    /// `hidden ← hidden + MLP(X)` for `X: (t, d_model)`, the normalised hidden states.
    ///
    /// `substitute` stands in for the routed experts; shared experts stay.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when widths do not fit, and the observer's.
    pub fn add_to(
        &self,
        hidden: &mut Array2<f32>,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        substitute: Option<(&MergedLayer, Choice)>,
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        let (layer, shared, capacity) = match self {
            Self::Dense(expert) => return add_expert(&expert.view(), x, None, hidden, cx),
            Self::Sparse { layer, shared, capacity } => (layer, shared, capacity),
        };
        let (layer, choice) = substitute.unwrap_or((layer, Choice::Mapped));
        let routed = route(layer, choice, x, windows, *capacity, cx)?;
        let output = routed_sum(&layer.experts, &routed.visits, x, cx)?;
        if let Some(observer) = observer {
            let (routed, output) = (&routed, output.view());
            let seen = Observation { id: layer.id, layer, windows, inputs: x, routed, output };
            observer.observe(&seen)?;
        }
        *hidden += &output;
        drop(output);
        match shared {
            Some(shared) => shared.add_to(x, hidden, cx),
            None => Ok(()),
        }
    }
}

/// One layer of a decoder-only model, in memory: `h ← h + A(norm h)`, then `h ← h + M(norm h)`.
///
/// Hidden states of all windows are stacked: `hidden: (t, d_model)`, and `windows` are consecutive
/// ranges of its rows. The two halves are separate, so that a caller can look at the input of the
/// MoE block, or put merged experts in the place of the routed ones.
#[derive(Debug)]
pub struct DecoderLayer {
    id: LayerId,
    rope: Rope,
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

/// Rows that go through attention together: bounds the memory of queries, keys and values.
const ROWS: usize = 4096;

impl DecoderLayer {
    /// Reads layer `index`; the source may then release what it mapped.
    ///
    /// # Errors
    /// Those of the source; [`ErrorKind::Shape`](crate::ErrorKind::Shape) for a tensor that does
    /// not fit the configuration and [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a
    /// NaN or infinite weight, with layer and tensor.
    pub fn load(source: &dyn TensorSource, spec: &Spec, index: usize) -> Result<Self> {
        let id = LayerId::causal(index);
        let prefix = format!("{}layers.{index}.", source.prefix());
        let layer = Self::read(source, spec, id, &prefix).in_layer(id)?;
        source.release(&prefix);
        Ok(layer)
    }

    fn read(source: &dyn TensorSource, spec: &Spec, id: LayerId, prefix: &str) -> Result<Self> {
        let loader = Loader::new(source, prefix);
        let mlp = loader.at("mlp");
        let d = spec.d_model;
        let mlp = if source.is_moe(id) {
            let shared = Shared::load(&mlp, spec)?.map(Box::new);
            Mlp::Sparse { layer: Box::new(source.moe(id)?), shared, capacity: None }
        } else {
            let Some(f) = spec.d_dense else {
                let keys = super::keys::Keys::root(source.config());
                return Err(keys.wrong("intermediate_size", "the width of dense MLPs", "nothing"));
            };
            Mlp::Dense(Box::new(mlp.gated((d, f), spec.activation, spec.mlp_bias)?))
        };
        Ok(Self {
            id,
            rope: spec.rope.clone(),
            attention_norm: loader.norm("input_layernorm", d, spec.eps)?,
            attention: Attention::load(&loader.at("self_attn"), spec, id.index)?,
            mlp_norm: loader.norm("post_attention_layernorm", d, spec.eps)?,
            mlp,
        })
    }

    /// Which layer it is.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// What follows the attention.
    pub fn mlp(&self) -> &Mlp {
        &self.mlp
    }

    /// The routed experts; `None` in a dense layer.
    pub fn moe(&self) -> Option<&MergedLayer> {
        match &self.mlp {
            Mlp::Dense(_) => None,
            Mlp::Sparse { layer, .. } => Some(layer),
        }
    }

    /// `h ← h + A(norm h)`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for windows that are not consecutive
    /// ranges over all rows.
    pub fn attention_half(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<()> {
        check_windows(windows, hidden.nrows())?;
        for batch in batches(windows) {
            let (first, end) = (batch[0].start, batch[batch.len() - 1].end);
            let local: Vec<_> = batch.iter().map(|w| w.start - first..w.end - first).collect();
            let fresh: Vec<_> = local.iter().map(|w| (w.clone(), 0)).collect();
            let rotation = self.rope.rotation(&fresh);
            let mut rows = hidden.slice_mut(s![first..end, ..]);
            let x = self.attention_norm.forward(rows.view())?;
            rows += &self.attention.forward(x.view(), &local, &rotation, cx).in_layer(self.id)?;
        }
        Ok(())
    }

    /// `norm h`, the input of router and experts: `(t, d_model)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `hidden` has another width.
    pub fn moe_input(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.mlp_norm.forward(hidden).in_layer(self.id)
    }

    /// `h ← h + M(x)` with `x` from [`moe_input`](Self::moe_input); see [`Mlp::add_to`].
    ///
    /// # Errors
    /// Those of [`Mlp::add_to`]; [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) when the
    /// hidden states are NaN or infinite afterwards.
    pub fn mlp_half(
        &self,
        hidden: &mut Array2<f32>,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        substitute: Option<(&MergedLayer, Choice)>,
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        use crate::model::Finite;
        self.mlp.add_to(hidden, x, windows, substitute, observer, cx).in_layer(self.id)?;
        hidden.check_finite("hidden states").in_layer(self.id)
    }

    /// Both halves.
    ///
    /// # Errors
    /// Those of the halves.
    pub fn forward(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        self.attention_half(hidden, windows, cx)?;
        let x = self.moe_input(hidden.view())?;
        self.mlp_half(hidden, x.view(), windows, None, observer, cx)
    }

    /// Both halves for the next tokens of one window, whose past is in the cache.
    pub(super) fn step(
        &self,
        hidden: &mut Array2<f32>,
        cache: &mut Cache,
        cx: &Context,
    ) -> Result<()> {
        let rows = 0..hidden.nrows();
        let rotation = self.rope.rotation(&[(rows.clone(), cache.len())]);
        let x = self.attention_norm.forward(hidden.view())?;
        *hidden += &self.attention.step(x.view(), &rotation, cache, cx).in_layer(self.id)?;
        let x = self.moe_input(hidden.view())?;
        self.mlp_half(hidden, x.view(), &[rows], None, None, cx)
    }
}

/// Windows must follow each other without gaps, be non-empty, and cover all rows.
pub(super) fn check_windows(windows: &[Range<usize>], rows: usize) -> Result<()> {
    let mut end = 0;
    for window in windows {
        if window.start != end || window.end <= window.start {
            let found = format!("{window:?}");
            return Err(Error::range("window", format!("rows from {end}, at least one"), found));
        }
        end = window.end;
    }
    if end == rows { Ok(()) } else { Err(Error::shape("windows over all rows", rows, end)) }
}

/// Consecutive windows of about [`ROWS`] rows in all.
pub(super) fn batches(windows: &[Range<usize>]) -> impl Iterator<Item = &[Range<usize>]> {
    let mut rest = windows;
    std::iter::from_fn(move || {
        let first = rest.first()?.start;
        let fits = rest.iter().take_while(|w| w.end - first <= ROWS).count();
        let (batch, later) = rest.split_at(fits.max(1));
        rest = later;
        Some(batch)
    })
}
