//! The methods that a recipe can name: one enum for each stage. A line of [`choices!`] holds all
//! that is to be known of a method: its name, its options, and the stage that they make. A stage of
//! one's own goes straight into the builder.

use serde::{Deserialize, Deserializer, Serialize};

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
use crate::recover::{Distill, KnowledgeDistillation, LeastSquares, Scale, Sequence, UnitScale};
use crate::similarity::{
    ExpertOutputs, ExpertWeights, Feature, FeatureAbs, FeatureCorrelation, Gradients,
    MergedOutputError, Random, RouterLogits, RouterWeightFeature, RouterWeights, TokenOutputs,
    WeightFeature, WeightGradients,
};
use crate::stage::Recoverer;

/// An enum of methods by name. A method is a stage with its own options, `"name" Variant(stage:
/// Type)`, or options of the recipe's own, `"name" Variant { option: Type }`; behind `=>` stands
/// what it makes, from these and the arguments of `fn`. Unknown options are refused.
macro_rules! choices {
    (
        $(#[$doc:meta])*
        $enum:ident by $tag:literal, fn $make:ident($($arg:ident: $argument:ty),*) -> $made:ty;
        $(
            $(#[$about:meta])*
            $name:literal $method:ident $(($stage:ident: $type:ty))? $({
                $($(#[$option_about:meta])* $option:ident: $option_type:ty,)*
            })? => $stage_of:expr;
        )+
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = $tag, deny_unknown_fields)]
        pub enum $enum {
            $(
                $(#[$about])*
                #[serde(rename = $name)]
                $method $(($type))? $({ $($(#[$option_about])* $option: $option_type,)* })?,
            )+
        }

        impl $enum {
            /// The names of all methods, as recipes spell them.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            pub(crate) fn $make(self $(, $arg: $argument)*) -> $made {
                match self {
                    $(Self::$method $(($stage))? $({ $($option,)* })? => $stage_of,)+
                }
            }
        }

        $($(
            impl From<$type> for $enum {
                fn from(stage: $type) -> Self {
                    Self::$method(stage)
                }
            }
        )?)+
    };
}
pub(super) use choices;

/// A stage without options, of which a recipe then gives none.
fn no_options<'de, D: Deserializer<'de>, T: Default>(input: D) -> std::result::Result<T, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct NoOptions {}
    NoOptions::deserialize(input).map(|NoOptions {}| T::default())
}

choices! {
    /// The metric: `metric = "router-logits"` and so on.
    #[derive(Copy)]
    SimilarityChoice by "metric", fn add_to(b: PipelineBuilder) -> PipelineBuilder;
    /// [`RouterLogits`] and its options.
    "router-logits" RouterLogits(stage: RouterLogits) => b.similarity(stage);
    /// [`RouterWeights`] and its options.
    "router-weights" RouterWeights(stage: RouterWeights) => b.similarity(stage);
    /// [`ExpertWeights`] and its options.
    "expert-weights" ExpertWeights(stage: ExpertWeights) => b.similarity(stage);
    /// [`WeightFeature`] and its options.
    "weight-feature" WeightFeature(stage: WeightFeature) => b.similarity(stage);
    /// [`RouterWeightFeature`] and its options.
    "router-weight-feature" RouterWeightFeature(stage: RouterWeightFeature) => b.similarity(stage);
    /// [`Feature`] and its options.
    "feature" Feature(stage: Feature) => b.similarity(stage);
    /// [`FeatureAbs`] and its options.
    "feature-abs" FeatureAbs(stage: FeatureAbs) => b.similarity(stage);
    /// [`MergedOutputError`] and its options.
    "merged-output-error" MergedOutputError(stage: MergedOutputError) => b.similarity(stage);
    /// [`FeatureCorrelation`] and its options.
    "feature-correlation" FeatureCorrelation(stage: FeatureCorrelation) => b.similarity(stage);
    /// [`Random`] and its options.
    "random" Random(stage: Random) => b.similarity(stage);
    /// [`ExpertOutputs`] and its options.
    "expert-outputs" ExpertOutputs(stage: ExpertOutputs) => b.similarity(stage);
    /// [`TokenOutputs`] and its options.
    "token-outputs" TokenOutputs(stage: TokenOutputs) => b.similarity(stage);
    /// [`Gradients`] and its options.
    "gradients" Gradients(stage: Gradients) => b.similarity(stage);
    /// [`WeightGradients`] and its options.
    "weight-gradients" WeightGradients(stage: WeightGradients) => b.similarity(stage);
}

choices! {
    /// How a group becomes one expert: `method = "weighted"` and so on.
    #[derive(Copy)]
    MergeChoice by "method", fn add_to(b: PipelineBuilder) -> PipelineBuilder;
    /// [`Weighted`] and its options.
    "weighted" Weighted(stage: Weighted) => b.merger(stage);
    /// [`DominantOnly`] and its options.
    #[serde(deserialize_with = "no_options")]
    "dominant-only" DominantOnly(stage: DominantOnly) => b.merger(stage);
    /// [`Fisher`] and its options.
    "fisher" Fisher(stage: Fisher) => b.merger(stage);
    /// [`ZipIt`] and its options.
    "zipit" ZipIt(stage: ZipIt) => b.merger(stage);
    /// [`FixDominant`] and its options.
    "fix-dominant" FixDominant(stage: FixDominant) => b.merger(stage);
    /// [`RegMean`] and its options.
    "reg-mean" RegMean(stage: RegMean) => b.merger(stage);
    /// [`MergeMoe`] and its options.
    "merge-moe" MergeMoe(stage: MergeMoe) => b.merger(stage);
}

choices! {
    /// The rows of a narrowed router: `method = "dominant-row"` and so on.
    #[derive(Copy)]
    RouterChoice by "method", fn add_to(b: PipelineBuilder) -> PipelineBuilder;
    /// [`DominantRow`] and its options.
    #[serde(deserialize_with = "no_options")]
    "dominant-row" DominantRow(stage: DominantRow) => b.router(stage);
    /// [`MeanRow`] and its options.
    #[serde(deserialize_with = "no_options")]
    "mean-row" MeanRow(stage: MeanRow) => b.router(stage);
    /// [`LogSumExpFit`] and its options.
    "log-sum-exp-fit" LogSumExpFit(stage: LogSumExpFit) => b.router(stage);
}

choices! {
    /// What brings a merged layer back: `method = "least-squares"` and so on.
    RecoverChoice by "method", fn stage() -> Box<dyn Recoverer>;
    /// [`Scale`] and its options.
    "scale" Scale(stage: Scale) => Box::new(stage);
    /// [`UnitScale`] and its options.
    "unit-scale" UnitScale(stage: UnitScale) => Box::new(stage);
    /// [`LeastSquares`] and its options.
    "least-squares" LeastSquares(stage: LeastSquares) => Box::new(stage);
    /// [`Distill`] and its options.
    "distill" Distill(stage: Distill) => Box::new(stage);
    /// [`KnowledgeDistillation`] and its options.
    "paper" Paper(stage: KnowledgeDistillation) => Box::new(stage);
}

impl RecoverChoice {
    /// All of them, one after the other.
    pub(crate) fn chain(choices: &[Self]) -> Sequence {
        Sequence(choices.iter().cloned().map(Self::stage).collect())
    }
}

choices! {
    /// How hidden units are lined up.
    #[derive(Copy)]
    AlignChoice by "method", fn add_to(b: PipelineBuilder) -> PipelineBuilder;
    /// Not at all.
    #[serde(deserialize_with = "no_options")]
    "identity" Identity => b;
    /// By a linear assignment on weights.
    "weight-matching" WeightMatching {
        /// Whose order is kept.
        #[serde(default = "dominant")]
        reference: Reference,
        /// Before grouping, or inside groups.
        #[serde(default)]
        when: AlignWhen,
        /// Relative duality gap at which the assignment may stop; 0 is exact.
        #[serde(default)]
        tolerance: f64,
    } => {
        let aligner = WeightMatching { tolerance, ..WeightMatching::default() };
        b.align(aligner, reference, when)
    };
    /// By a linear assignment on correlations of hidden activations.
    "activation-matching" ActivationMatching {
        /// Whose order is kept.
        #[serde(default = "dominant")]
        reference: Reference,
        /// Before grouping, or inside groups.
        #[serde(default)]
        when: AlignWhen,
    } => b.align(ActivationMatching::default(), reference, when);
}

fn dominant() -> Reference {
    Reference::Dominant
}

choices! {
    /// Which experts become one. `spread` says how the budget is spread over layers: globally in
    /// native and expanded exports and uniformly in stock ones, unless given.
    #[derive(Copy)]
    GroupChoice by "method", fn add_to(b: PipelineBuilder, default: Spread) -> PipelineBuilder;
    /// Dominant experts, and the others to the most similar dominant (the paper).
    "dominant" Dominant {
        /// What makes an expert dominant.
        #[serde(default = "frequency")]
        importance: Importance,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
        /// How layers are made comparable.
        #[serde(default)]
        scale: LayerScale,
    } => b.grouper(Dominant { importance, spread: spread.unwrap_or(default), scale });
    /// Agglomerative clustering.
    "agglomerative" Agglomerative {
        /// The linkage.
        #[serde(default)]
        linkage: Linkage,
        /// The expert that stands for its group.
        #[serde(default)]
        representative: Representative,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
    } => {
        let spread = spread.unwrap_or(default);
        b.grouper(Agglomerative { linkage, representative, spread })
    };
    /// [`KMeans`] and its options.
    "k-means" KMeans(stage: KMeans) => b.grouper(stage);
    /// [`RandomGroups`] and its options.
    "random" Random(stage: RandomGroups) => b.grouper(stage);
    /// Expert pruning.
    "prune" Prune {
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
    } => b.grouper(Prune { importance, absorb, spread: spread.unwrap_or(default), scale });
    /// Removal by measured error; see [`Removal`] for the options.
    "removal" Removal {
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
    } => {
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
    };
    /// Task-specific expert pruning.
    "task-specific" TaskSpecific {
        /// Experts used less than this share of an equal split are pruned.
        #[serde(default = "tenth")]
        beta: f64,
        /// How the budget is spread.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spread: Option<Spread>,
    } => b.grouper(TaskSpecific { beta, spread: spread.unwrap_or(default) });
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
