//! Inputs of stages: a layer, a pair of experts, a group.

use ndarray::ArrayView2;

use super::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{
    Expert, ExpertView, Grouping, LayerId, MoeLayer, Permutation, Router, RoutingStats,
    SimilarityMatrix,
};

/// A layer as a stage sees it: router, statistics, and, when it asked for
/// [`Needs::EXPERTS`](super::Needs::EXPERTS) or works after grouping, the experts.
#[derive(Debug, Clone, Copy)]
pub struct LayerView<'a> {
    /// Which layer it is.
    pub id: LayerId,
    /// Its router.
    pub router: &'a Router,
    /// Its routing statistics.
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

/// The input of a grouper for one layer.
#[derive(Debug, Clone)]
pub struct LayerSummary {
    /// Which layer it is.
    pub id: LayerId,
    /// The similarity of its experts.
    pub similarity: SimilarityMatrix,
    /// Its statistics, without per-token parts.
    pub stats: RoutingStats,
    /// What the grouper's [`survey`](super::Grouper::survey) found, if it made one: at most one
    /// for each number of groups, ascending.
    pub candidates: Option<Vec<Candidate>>,
}

/// A grouping of a layer and the error that was measured for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The grouping.
    pub grouping: Grouping,
    /// `Σ ‖y − t‖² / Σ ‖t‖²` of the layer's output; 0 for the layer as it is.
    pub error: f64,
}

impl LayerSummary {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.similarity.experts()
    }
}

/// Two experts to align, and inputs on which to compare their activations.
#[derive(Debug, Clone, Copy)]
pub struct AlignPair<'a> {
    /// The expert whose order of hidden units is kept.
    pub reference: ExpertView<'a>,
    /// The expert to permute.
    pub target: ExpertView<'a>,
    /// `(t, d_model)` inputs routed to either; present when the aligner needs samples.
    pub inputs: Option<ArrayView2<'a, f32>>,
}

/// A group of experts to merge, with the permutations that align them.
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
    /// For each expert, the permutation that aligns it.
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
