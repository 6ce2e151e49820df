//! One serde enum per stage: the choices that a recipe can name. Nothing but construction happens
//! here; a stage of one's own goes straight into the builder.

use serde::{Deserialize, Serialize};

use crate::align::{ActivationMatching, Reference, WeightMatching};
use crate::error::Result;
use crate::group::{
    Absorb, Agglomerative, Dominant, KMeans, LayerScale, Linkage, Prune, RandomGroups, Removal,
    Representative, Rest, Spread, TaskSpecific,
};
use crate::merge::router::{DominantRow, LogSumExpFit, MeanRow};
use crate::merge::{DominantOnly, Fisher, FixDominant, MergeMoe, RegMean, Weighted, ZipIt};
use crate::model::Importance;
use crate::pipeline::builder::PipelineBuilder;
use crate::pipeline::options::AlignWhen;
use crate::recover::{Chain, Distill, LeastSquares, Paper, Scale, UnitScale};
use crate::similarity::{
    ExpertOutputs, ExpertWeights, Feature, FeatureAbs, FeatureCorrelation, Gradients,
    MergedOutputError, Random, RouterLogits, RouterWeightFeature, RouterWeights, TokenOutputs,
    WeightFeature, WeightGradients,
};
use crate::stage::Recoverer;

/// An enum of stages by name, each with its own options, and its way into the builder.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident, $tag:literal, $method:ident: $($stage:ident),+) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
        #[serde(tag = $tag, rename_all = "kebab-case")]
        pub enum $name {
            $(
                #[doc = concat!("[`", stringify!($stage), "`] and its options.")]
                $stage($stage),
            )+
        }

        impl $name {
            pub(crate) fn add_to(self, builder: PipelineBuilder) -> PipelineBuilder {
                match self {
                    $(Self::$stage(stage) => builder.$method(stage),)+
                }
            }
        }

        $(
            impl From<$stage> for $name {
                fn from(stage: $stage) -> Self {
                    Self::$stage(stage)
                }
            }
        )+
    };
}

choice! {
    /// The metric: `metric = "router-logits"` and so on.
    SimilarityChoice, "metric", similarity:
    RouterLogits, RouterWeights, ExpertWeights, WeightFeature, RouterWeightFeature, Feature,
    FeatureAbs, MergedOutputError, FeatureCorrelation, Random, ExpertOutputs, TokenOutputs,
    Gradients, WeightGradients
}

choice! {
    /// How a group becomes one expert: `method = "weighted"` and so on.
    MergeChoice, "method", merger:
    Weighted, DominantOnly, Fisher, ZipIt, FixDominant, RegMean, MergeMoe
}

choice! {
    /// The rows of a narrowed router: `method = "dominant-row"` and so on.
    RouterChoice, "method", router:
    DominantRow, MeanRow, LogSumExpFit
}

/// What brings a merged layer back: `method = "least-squares"` and so on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case")]
pub enum RecoverChoice {
    /// [`Scale`] and its options.
    Scale(Scale),
    /// [`UnitScale`] and its options.
    UnitScale(UnitScale),
    /// [`LeastSquares`] and its options.
    LeastSquares(LeastSquares),
    /// [`Distill`] and its options.
    Distill(Distill),
    /// [`Paper`] and its options.
    Paper(Paper),
}

impl RecoverChoice {
    /// All of them, one after the other.
    pub(crate) fn chain(choices: &[Self]) -> Chain {
        let boxed = |choice: &Self| -> Box<dyn Recoverer> {
            match choice.clone() {
                Self::Scale(stage) => Box::new(stage),
                Self::UnitScale(stage) => Box::new(stage),
                Self::LeastSquares(stage) => Box::new(stage),
                Self::Distill(stage) => Box::new(stage),
                Self::Paper(stage) => Box::new(stage),
            }
        };
        Chain(choices.iter().map(boxed).collect())
    }
}

/// The linear-algebra backend; see [`crate::linalg::LinalgBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FactoriseChoice {
    /// This crate's own functions, the same bits everywhere.
    #[default]
    PureRust,
    /// LAPACK, in builds with the feature `lapack`.
    Lapack,
}

impl FactoriseChoice {
    pub(crate) fn add_to(self, b: PipelineBuilder) -> Result<PipelineBuilder> {
        match self {
            Self::PureRust => Ok(b),
            #[cfg(feature = "lapack")]
            Self::Lapack => Ok(b.factorise(std::sync::Arc::new(crate::linalg::Lapack))),
            #[cfg(not(feature = "lapack"))]
            Self::Lapack => Err(crate::error::ErrorKind::Unsupported {
                what: "factorisations",
                found: "lapack".into(),
                supported: "pure-rust; lapack in a build with the feature lapack-openblas-system \
                            or one of its kin"
                    .into(),
            }
            .into()),
        }
    }
}

/// How hidden units are lined up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AlignChoice {
    /// Not at all.
    Identity,
    /// By a linear assignment on weights.
    WeightMatching {
        /// Whose order is kept.
        #[serde(default = "dominant")]
        reference: Reference,
        /// Before grouping, or inside groups.
        #[serde(default)]
        when: AlignWhen,
        /// Relative duality gap at which the assignment may stop; 0 is exact.
        #[serde(default)]
        tolerance: f64,
    },
    /// By a linear assignment on correlations of hidden activations.
    ActivationMatching {
        /// Whose order is kept.
        #[serde(default = "dominant")]
        reference: Reference,
        /// Before grouping, or inside groups.
        #[serde(default)]
        when: AlignWhen,
    },
}

fn dominant() -> Reference {
    Reference::Dominant
}

impl AlignChoice {
    pub(crate) fn add_to(self, b: PipelineBuilder) -> PipelineBuilder {
        match self {
            Self::Identity => b,
            Self::WeightMatching { reference, when, tolerance } => {
                let aligner = WeightMatching { tolerance, ..WeightMatching::default() };
                b.align(aligner, reference, when)
            }
            Self::ActivationMatching { reference, when } => {
                b.align(ActivationMatching::default(), reference, when)
            }
        }
    }
}

/// Which experts become one. `spread` says how the budget is spread over layers: globally in native
/// and expanded exports and uniformly in stock ones, unless given.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum GroupChoice {
    /// Dominant experts, and the others to the most similar dominant (the paper).
    Dominant {
        /// What makes an expert dominant.
        #[serde(default = "frequency")]
        importance: Importance,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
        /// How layers are made comparable.
        #[serde(default)]
        scale: LayerScale,
    },
    /// Agglomerative clustering.
    Agglomerative {
        /// The linkage.
        #[serde(default)]
        linkage: Linkage,
        /// The expert that stands for its group.
        #[serde(default)]
        representative: Representative,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
    },
    /// k-means.
    KMeans(KMeans),
    /// Groups at random.
    Random(RandomGroups),
    /// Expert pruning.
    Prune {
        /// What an expert is worth.
        importance: Importance,
        /// Where the tokens of pruned experts go.
        #[serde(default)]
        absorb: Absorb,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
        /// How layers are made comparable.
        #[serde(default)]
        scale: LayerScale,
    },
    /// Removal by measured error; see [`Removal`] for the options.
    Removal {
        /// What becomes of the experts that do not stay.
        #[serde(default)]
        rest: Rest,
        /// Whether errors are those after a refit.
        #[serde(default = "yes")]
        refit: bool,
        /// How the budget is spread: uniformly, unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
        /// The most sampled tokens that are used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tokens: Option<usize>,
        /// How many moves of either kind are measured after a refit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shortlist: Option<usize>,
        /// The most subsets of a layer that are all tried.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exhaustive: Option<usize>,
        /// The multiple of the layer's median peak output above which an expert stays, alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        protect_super: Option<f64>,
    },
    /// Task-specific expert pruning.
    TaskSpecific {
        /// Experts used less than this share of an equal split are pruned.
        #[serde(default = "tenth")]
        beta: f64,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
    },
}

fn frequency() -> Importance {
    Importance::Frequency
}

fn tenth() -> f64 {
    0.1
}

fn yes() -> bool {
    true
}

impl GroupChoice {
    pub(crate) fn add_to(self, b: PipelineBuilder, default: Spread) -> PipelineBuilder {
        let or = |spread: Option<Spread>| spread.unwrap_or(default);
        match self {
            Self::Dominant { importance, spread, scale } => {
                b.grouper(Dominant { importance, spread: or(spread), scale })
            }
            Self::Agglomerative { linkage, representative, spread } => {
                b.grouper(Agglomerative { linkage, representative, spread: or(spread) })
            }
            Self::KMeans(method) => b.grouper(method),
            Self::Random(method) => b.grouper(method),
            Self::Prune { importance, absorb, spread, scale } => {
                b.grouper(Prune { importance, absorb, spread: or(spread), scale })
            }
            Self::Removal { rest, refit, spread, tokens, shortlist, exhaustive, protect_super } => {
                let base = Removal::default();
                b.grouper(Removal {
                    rest,
                    refit,
                    spread: spread.unwrap_or(base.spread),
                    tokens: tokens.unwrap_or(base.tokens),
                    shortlist: shortlist.unwrap_or(base.shortlist),
                    exhaustive: exhaustive.unwrap_or(base.exhaustive),
                    protect_super,
                    ..base
                })
            }
            Self::TaskSpecific { beta, spread } => {
                b.grouper(TaskSpecific { beta, spread: or(spread) })
            }
        }
    }
}
