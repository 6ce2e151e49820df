//! The second half of a layer: a dense MLP, or experts that can be observed and replaced.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use super::expert::add_expert;
use super::route::{Choice, Routed, route};
use super::shared::Shared;
use super::sum::{Watched, sum_of};
use crate::error::{Locate, Result};
use crate::forward::norm::RmsNorm;
use crate::model::{
    Expert, FactoredExpert, FactoredLayer, Finite, LayerId, MergedLayer, MoeLayer, OutputSums,
    TensorSource,
};
use crate::par;
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
    /// For each expert of the layer its outputs before the weights, summed over `routed.visits`;
    /// if [`Observer::watches_outputs`].
    pub outputs: Option<&'a [OutputSums]>,
}

/// Looks at the sparse layers of a pass, in order.
pub trait Observer {
    /// Whether [`Observation::outputs`] are wanted.
    fn watches_outputs(&self) -> bool {
        false
    }

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
        /// The routed experts; none, but their router, where they are in factors.
        layer: Box<MergedLayer>,
        /// The routed experts of a native folder that holds them in factors, as they lie.
        factored: Option<Vec<FactoredExpert>>,
        /// The shared expert.
        shared: Option<Box<Shared>>,
        /// Tokens per window that an expert takes (Switch).
        capacity: Option<usize>,
    },
}

impl Mlp {
    /// Reads the routed experts of a layer.
    pub(crate) fn sparse(
        source: &dyn TensorSource,
        id: LayerId,
        shared: Option<Box<Shared>>,
        capacity: Option<usize>,
    ) -> Result<Self> {
        let Some(FactoredLayer { id, experts, grouping, router }) = source.moe_in_factors(id)?
        else {
            let layer = Box::new(source.moe(id)?);
            return Ok(Self::Sparse { layer, factored: None, shared, capacity });
        };
        let (none, narrowed, factors) = (Vec::new(), None, None);
        let layer = MergedLayer { id, experts: none, grouping, router, narrowed, factors };
        Ok(Self::Sparse { layer: Box::new(layer), factored: Some(experts), shared, capacity })
    }

    /// `hidden ← hidden + MLP(X)` for `X: (t, d_model)`, the normalised hidden states.
    ///
    /// `substitute` stands in for the routed experts; shared experts stay. Experts in factors are
    /// not multiplied out, unless there is an observer to see them.
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
        let (layer, factored, shared, capacity) = match self {
            Self::Dense(expert) => return add_expert(&expert.view(), x, None, hidden, cx),
            Self::Sparse { layer, factored, shared, capacity } => {
                (layer, factored.as_deref(), shared, capacity)
            }
        };
        let factored = factored.filter(|_| substitute.is_none());
        let (layer, choice) = substitute.unwrap_or((layer, Choice::Mapped));
        let routed = route(layer, choice, x, windows, *capacity, cx)?;
        let watched = observer.as_ref().is_some_and(|o| o.watches_outputs());
        let (output, outputs) = output(layer, factored, &routed, x, watched, cx)?;
        if let Some(observer) = observer {
            let whole = factored.map(|experts| multiplied_out(layer, experts, cx)).transpose()?;
            observer.observe(&Observation {
                id: layer.id,
                layer: whole.as_ref().unwrap_or(layer),
                windows,
                inputs: x,
                routed: &routed,
                output: output.view(),
                outputs: watched.then_some(&outputs[..]),
            })?;
        }
        *hidden += &output;
        drop(output);
        match shared {
            Some(shared) => shared.add_to(x, hidden, cx),
            None => Ok(()),
        }
    }
}

/// `Σ_e w_e(x) E_e(x)` of the layer's own experts.
fn output(
    layer: &MergedLayer,
    factored: Option<&[FactoredExpert]>,
    routed: &Routed,
    x: ArrayView2<'_, f32>,
    watched: bool,
    cx: &Context,
) -> Result<Watched> {
    match factored {
        None => sum_of(&layer.experts, &routed.visits, x, watched, cx),
        Some(experts) => sum_of(experts, &routed.visits, x, watched, cx),
    }
}

fn multiplied_out(
    layer: &MergedLayer,
    experts: &[FactoredExpert],
    cx: &Context,
) -> Result<MergedLayer> {
    let dense =
        par::map(experts.len(), |i| experts[i].to_expert(cx.per_task().compute()).in_expert(i))?;
    let (grouping, router) = (layer.grouping.clone(), layer.router.clone());
    MergedLayer::new(layer.id, dense, grouping, router, None)
}

/// `h ← h + M(norm h)`.
#[derive(Debug)]
pub struct FeedForward {
    id: LayerId,
    norm: RmsNorm,
    mlp: Mlp,
}

impl FeedForward {
    pub(crate) fn new(id: LayerId, norm: RmsNorm, mlp: Mlp) -> Self {
        Self { id, norm, mlp }
    }

    /// Which layer it belongs to.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The MLP or the experts.
    pub fn mlp(&self) -> &Mlp {
        &self.mlp
    }

    /// The routed experts and their router; `None` in a dense layer. Experts in factors are not
    /// among them.
    pub fn moe(&self) -> Option<&MergedLayer> {
        match &self.mlp {
            Mlp::Dense(_) => None,
            Mlp::Sparse { layer, .. } => Some(layer),
        }
    }

    /// Takes the routed experts and their router out, as a layer that was never merged; what is
    /// left computes with a substitute only. `None` in a dense or a merged layer.
    pub fn take_moe(&mut self) -> Option<MoeLayer> {
        let Mlp::Sparse { layer, factored, .. } = &mut self.mlp else { return None };
        if !layer.grouping.is_identity() || factored.is_some() {
            return None;
        }
        let experts = std::mem::take(&mut layer.experts);
        MoeLayer::new(layer.id, experts, layer.router.clone()).ok()
    }

    /// Routes `x` through the layer's own experts: their output alone, `(t, d_model)`, without
    /// shared experts; `None` in a dense layer.
    ///
    /// # Errors
    /// As [`Mlp::add_to`].
    pub fn routed(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        cx: &Context,
    ) -> Result<Option<Array2<f32>>> {
        let Mlp::Sparse { layer, factored, capacity, .. } = &self.mlp else { return Ok(None) };
        let routed = route(layer, Choice::Mapped, x, windows, *capacity, cx).in_layer(self.id)?;
        let sum = output(layer, factored.as_deref(), &routed, x, false, cx).in_layer(self.id)?;
        Ok(Some(sum.0))
    }

    /// `norm h`, the input of router and experts: `(t, d_model)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `hidden` has another width.
    pub fn input(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.norm.forward(hidden).in_layer(self.id)
    }

    /// `h ← h + M(x)` with `x` from [`input`](Self::input); see [`Mlp::add_to`].
    ///
    /// # Errors
    /// Those of [`Mlp::add_to`]; [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) when the
    /// hidden states are NaN or infinite afterwards.
    pub fn add_to(
        &self,
        hidden: &mut Array2<f32>,
        x: ArrayView2<'_, f32>,
        windows: &[Range<usize>],
        substitute: Option<(&MergedLayer, Choice)>,
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        self.mlp.add_to(hidden, x, windows, substitute, observer, cx).in_layer(self.id)?;
        hidden.check_finite("hidden states").in_layer(self.id)
    }

    /// All of it, without substitute.
    ///
    /// # Errors
    /// Those of [`input`](Self::input) and [`add_to`](Self::add_to).
    pub fn forward(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[Range<usize>],
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        let x = self.input(hidden.view())?;
        self.add_to(hidden, x.view(), windows, None, observer, cx)
    }
}
