//! The stages of a merge, as object-safe traits with one required method each, and what they share:
//! the statistics they need ([`Needs`]), the layer they look at ([`LayerView`]) and where they run
//! ([`Context`]).
//!
//! Every trait is implemented for `&T` and `Box<T>`, so stages compose and can be boxed by the
//! pipeline's builder. A stage never learns which stage ran before it.

use std::fmt::Debug;
use std::ops::BitOr;
use std::sync::Arc;

use ndarray::ArrayView2;

use crate::error::{Error, ErrorKind, Result};
use crate::linalg::{Compute, Cpu};
use crate::model::{
    Budget, Expert, ExpertView, Grouping, LayerId, MoeLayer, Permutation, Router, RoutingStats,
    SimilarityMatrix,
};

/// What a stage reads besides the weights it is handed. A plan unites the needs of its stages and
/// refuses before any weight is read when the statistics cannot serve them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs(u16);

impl Needs {
    /// Activation counts only, which are always there.
    pub const NONE: Self = Self(0);
    /// The experts' weights, before grouping.
    pub const EXPERTS: Self = Self(1);
    /// The Gram matrix of the router logits.
    pub const LOGIT_GRAM: Self = Self(1 << 1);
    /// The sum of the applied router weights.
    pub const ROUTER_MASS: Self = Self(1 << 2);
    /// Mean output norms.
    pub const OUTPUT_NORM: Self = Self(1 << 3);
    /// REAP saliency.
    pub const REAP: Self = Self(1 << 4);
    /// Mean expert outputs.
    pub const MEAN_OUTPUT: Self = Self(1 << 5);
    /// Per-token inputs, logits and routing.
    pub const SAMPLES: Self = Self(1 << 6);
    /// Gradients of the experts' weights.
    pub const GRADIENTS: Self = Self(1 << 7);
    /// Diagonal Fisher information of the experts' weights.
    pub const FISHER: Self = Self(1 << 8);

    /// All statistics that a forward pass gives: no weights, and nothing that needs a gradient.
    pub const OBSERVABLE: Self = Self(
        Self::LOGIT_GRAM.0
            | Self::ROUTER_MASS.0
            | Self::OUTPUT_NORM.0
            | Self::REAP.0
            | Self::MEAN_OUTPUT.0
            | Self::SAMPLES.0,
    );

    const NAMES: [(Self, &'static str); 9] = [
        (Self::EXPERTS, "expert weights"),
        (Self::LOGIT_GRAM, "the router-logit Gram matrix (or router logits)"),
        (Self::ROUTER_MASS, "router mass (or applied weights)"),
        (Self::OUTPUT_NORM, "expert output norms"),
        (Self::REAP, "REAP saliency"),
        (Self::MEAN_OUTPUT, "mean expert outputs"),
        (Self::SAMPLES, "per-token inputs, logits and routing"),
        (Self::GRADIENTS, "gradients"),
        (Self::FISHER, "Fisher information"),
    ];

    /// Whether all of `other` is needed.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is needed here but not in `given`.
    pub const fn without(self, given: Self) -> Self {
        Self(self.0 & !given.0)
    }

    /// The parts, in words.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(n, _)| self.contains(*n)).map(|(_, name)| name)
    }
}

impl BitOr for Needs {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Where a stage runs: a device and a seed. No globals, no environment.
#[derive(Debug, Clone)]
pub struct Context {
    compute: Arc<dyn Compute>,
    seed: u64,
}

impl Context {
    /// The CPU, over the caller's rayon pool.
    pub fn cpu(seed: u64) -> Self {
        Self::on(Arc::new(Cpu::new()), seed)
    }

    /// A given device.
    pub fn on(compute: Arc<dyn Compute>, seed: u64) -> Self {
        Self { compute, seed }
    }

    /// The device.
    pub fn compute(&self) -> &dyn Compute {
        &*self.compute
    }

    /// The same context for use inside a task that runs in parallel with others.
    pub fn per_task(&self) -> Self {
        Self { compute: self.compute.per_task(), seed: self.seed }
    }

    /// The seed of every random choice.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

/// A layer as a stage sees it: router, statistics, and, when it asked for [`Needs::EXPERTS`] or
/// works after grouping, the experts.
#[derive(Debug, Clone, Copy)]
pub struct LayerView<'a> {
    /// Which layer it is.
    pub id: LayerId,
    /// Its router.
    pub router: &'a Router,
    /// What was observed of it.
    pub stats: &'a RoutingStats,
    experts: Option<&'a [Expert]>,
}

impl<'a> LayerView<'a> {
    /// A view without experts.
    pub fn new(id: LayerId, router: &'a Router, stats: &'a RoutingStats) -> Self {
        Self { id, router, stats, experts: None }
    }

    /// A view of a whole layer.
    pub fn of(layer: &'a MoeLayer, stats: &'a RoutingStats) -> Self {
        Self { id: layer.id(), router: layer.router(), stats, experts: Some(layer.experts()) }
    }

    /// The same view with another router.
    #[must_use]
    pub fn with_router(self, router: &'a Router) -> Self {
        Self { router, ..self }
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.router.experts()
    }

    /// Whether there are no experts; never true for a valid router.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The experts, or an error that names the stage that forgot to ask for them.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`].
    pub fn experts(&self, stage: &str) -> Result<&'a [Expert]> {
        self.experts.ok_or_else(|| {
            let needs = "expert weights".into();
            let remedy = "return Needs::EXPERTS from the stage's needs()".into();
            ErrorKind::Missing { stage: stage.into(), needs, remedy }.into()
        })
    }
}

/// What all stages have.
pub trait Stage: Debug + Send + Sync {
    /// The stage's name in recipes and reports, e.g. `router-logits`.
    fn name(&self) -> &str;

    /// The statistics it reads. Override it when the stage reads more than activation counts; a
    /// stage that asks for less than it reads fails at run time with [`ErrorKind::Missing`].
    fn needs(&self) -> Needs {
        Needs::NONE
    }
}

/// How alike are the experts of a layer?
pub trait Similarity: Stage {
    /// A symmetric `(n, n)` table.
    ///
    /// # Errors
    /// Those of the metric; see each implementation.
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix>;
}

/// What a grouper knows of one layer.
#[derive(Debug, Clone)]
pub struct LayerSummary {
    /// Which layer it is.
    pub id: LayerId,
    /// How alike its experts are.
    pub similarity: SimilarityMatrix,
    /// Its statistics, without per-token parts.
    pub stats: RoutingStats,
}

impl LayerSummary {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.similarity.experts()
    }
}

/// Which experts become one? Sees all layers at once, because the number of experts per layer may
/// follow from a budget over all of them.
pub trait Grouper: Stage {
    /// One grouping per layer, in order, that meets the budget exactly.
    ///
    /// # Errors
    /// [`ErrorKind::Budget`] when the budget cannot be met; else those of the method.
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Grouping>>;
}

/// Two experts to be lined up, and inputs on which to compare their activations.
#[derive(Debug, Clone, Copy)]
pub struct AlignPair<'a> {
    /// The expert whose order of hidden units is kept.
    pub reference: ExpertView<'a>,
    /// The expert to permute.
    pub target: ExpertView<'a>,
    /// `(t, d_model)` inputs routed to either; present when the aligner needs samples.
    pub inputs: Option<ArrayView2<'a, f32>>,
}

/// In which order do a target's hidden units line up with a reference's?
pub trait Aligner: Stage {
    /// The permutation that makes the target most like the reference.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the experts differ in kind; else those of the method.
    fn align(&self, pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation>;
}

/// A group of experts to merge, lined up.
#[derive(Debug, Clone, Copy)]
pub struct Members<'a> {
    /// The layer they come from.
    pub layer: LayerView<'a>,
    /// Their indices in the layer, ascending.
    pub indices: &'a [usize],
    /// Position in `indices` of the dominant expert.
    pub dominant: usize,
    /// The experts, not yet permuted.
    pub experts: &'a [ExpertView<'a>],
    /// For each expert, the permutation that lines it up.
    pub permutations: &'a [Permutation],
}

impl Members<'_> {
    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the lists differ in length or are empty, or an expert in kind.
    pub fn check(&self) -> Result<()> {
        let n = self.indices.len();
        let found = (self.experts.len(), self.permutations.len());
        if n == 0 || found != (n, n) || self.dominant >= n {
            return Err(Error::shape("group members", (n, n), found));
        }
        match self.experts.iter().find(|e| !e.same_kind(&self.experts[0])) {
            None => Ok(()),
            Some(other) => {
                let expected = self.experts[0].up.weight.dim();
                Err(Error::shape("group members of one kind", expected, other.up.weight.dim()))
            }
        }
    }

    /// The members' entries of a per-expert vector of the layer.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when `of_layer` is shorter than a member's index.
    pub fn pick(&self, of_layer: &[f64]) -> Result<Vec<f64>> {
        let get = |&i: &usize| of_layer.get(i).copied();
        let picked: Option<Vec<f64>> = self.indices.iter().map(get).collect();
        picked.ok_or_else(|| Error::shape("per-expert vector", self.layer.len(), of_layer.len()))
    }

    /// Member `i` with its hidden units in the common order.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the permutation does not fit.
    pub fn aligned(&self, i: usize, cx: &Context) -> Result<Expert> {
        self.experts[i].permuted(&self.permutations[i], cx.compute())
    }

    /// `Σ w_i P_i(E_i) / Σ w_i`: the weighted average of the aligned members. Weights that sum to
    /// 0 (a group that no token visited) are replaced by equal ones.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a negative or non-finite weight.
    pub fn average(&self, weights: &[f64], cx: &Context) -> Result<Expert> {
        self.check()?;
        if weights.len() != self.experts.len() {
            return Err(Error::shape("merge weights", self.experts.len(), weights.len()));
        }
        if let Some(w) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            return Err(Error::range("merge weight", "0 or more", w));
        }
        let total: f64 = weights.iter().sum();
        let share = |w: f64| if total > 0.0 { w / total } else { 1.0 / weights.len() as f64 };
        let members = weights.iter().zip(self.experts).zip(self.permutations);
        let terms: Vec<_> = members
            .map(|((&w, &e), p)| (share(w) as f32, e, p))
            .filter(|(w, ..)| *w > 0.0)
            .collect();
        Expert::weighted_sum(&terms, cx.compute())
    }

    /// Inputs of the tokens routed to any member: `(t, d_model)`.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] without samples.
    pub fn inputs(&self, stage: &str) -> Result<ndarray::Array2<f32>> {
        Ok(self.layer.stats.need_samples(stage)?.inputs_of(self.indices))
    }
}

/// One expert from a group.
pub trait Merger: Stage {
    /// The merged expert, in the common order of hidden units.
    ///
    /// # Errors
    /// Those of the method; see each implementation.
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert>;
}

/// A router with one row per group, for runtimes that know no expert map.
pub trait RouterMerger: Stage {
    /// The `m`-row router, its policy included.
    ///
    /// # Errors
    /// Those of the method; [`ErrorKind::OutOfRange`] when top-k exceeds the number of groups.
    fn merge_router(
        &self,
        layer: &LayerView<'_>,
        grouping: &Grouping,
        cx: &Context,
    ) -> Result<Router>;
}

macro_rules! forward {
    ($stage:ident, $($method:ident($($arg:ident: $type:ty),*) -> $out:ty);+) => {
        forward!(@one $stage, &T, $($method($($arg: $type),*) -> $out);+);
        forward!(@one $stage, Box<T>, $($method($($arg: $type),*) -> $out);+);
    };
    (@one $stage:ident, $ptr:ty, $($method:ident($($arg:ident: $type:ty),*) -> $out:ty);+) => {
        impl<T: $stage + ?Sized> $stage for $ptr {
            $(fn $method(&self, $($arg: $type),*) -> $out {
                (**self).$method($($arg),*)
            })+
        }
    };
}

forward!(Stage, name() -> &str; needs() -> Needs);
forward!(Similarity,
    similarity(layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix>);
forward!(Grouper,
    group(layers: &[LayerSummary], budget: &Budget, cx: &Context) -> Result<Vec<Grouping>>);
forward!(Aligner, align(pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation>);
forward!(Merger, merge(members: &Members<'_>, cx: &Context) -> Result<Expert>);
forward!(RouterMerger,
    merge_router(layer: &LayerView<'_>, grouping: &Grouping, cx: &Context) -> Result<Router>);

#[cfg(test)]
mod tests {
    use super::*;

    fn thread_safe<T: Send + Sync + ?Sized>() {}

    #[test]
    fn stages_are_objects_that_cross_threads() {
        thread_safe::<dyn Similarity>();
        thread_safe::<dyn Grouper>();
        thread_safe::<dyn Aligner>();
        thread_safe::<dyn Merger>();
        thread_safe::<dyn RouterMerger>();
        thread_safe::<Context>();
    }

    #[test]
    fn needs_unite_and_name_what_is_missing() {
        let needs = Needs::REAP | Needs::SAMPLES;
        assert!(needs.contains(Needs::REAP) && !needs.contains(Needs::FISHER));
        let missing: Vec<_> = needs.without(Needs::SAMPLES).names().collect();
        assert_eq!(missing, ["REAP saliency"]);
    }
}
