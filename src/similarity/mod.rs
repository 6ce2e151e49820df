//! Similarity metrics between the experts of a layer: one metric a file.
//!
//! Every metric is a small struct that implements [`Similarity`](crate::stage::Similarity); its
//! [`needs`](crate::stage::Stage::needs) name the statistics it reads. Larger is more alike, the
//! table is symmetric, its diagonal is 1 and maximal (the one exception is marked), and the bits do
//! not depend on the number of threads.
//!
//! | reads | metrics |
//! |---|---|
//! | router | [`RouterLogits`] (the paper's choice), [`RouterWeights`], [`RouterWeightFeature`] |
//! | weights | [`ExpertWeights`], [`WeightFeature`], [`Gradients`], [`WeightGradients`] |
//! | inputs | [`Feature`], [`FeatureAbs`] |
//! | outputs | [`ExpertOutputs`], [`TokenOutputs`], [`MergedOutputError`] |
//! | hidden units | [`FeatureCorrelation`] |
//! | nothing | [`Random`] |
//!
//! Metrics on weights compare entry by entry, so two experts that differ only in the order of their
//! hidden units look unrelated to them: align the layer first, or use another basis.
//!
//! ```
//! use mcsmoe::model::{LayerId, Router, RoutingRule, RoutingStats};
//! use mcsmoe::similarity::RouterWeights;
//! use mcsmoe::stage::{Context, LayerView, Similarity};
//! use ndarray::array;
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let rows = array![[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]];
//! let router = Router::new(rows, None, None, RoutingRule::softmax(1, false))?;
//! let stats = RoutingStats::from_counts(vec![5, 3, 2], 10);
//! let layer = LayerView::new(LayerId::causal(0), &router, &stats);
//! let table = RouterWeights::default().similarity(&layer, &Context::cpu(0))?;
//! let table = table.similarities();
//! assert!(table[[0, 1]] > table[[0, 2]]);
//! # Ok(())
//! # }
//! ```

mod expert_outputs;
mod expert_weights;
mod feature;
mod feature_correlation;
mod gradients;
mod merged_output_error;
mod random;
mod router_logits;
mod router_weight_feature;
mod router_weights;
mod support;
mod token_outputs;
mod weight_feature;

pub use expert_outputs::{ExpertOutputs, OutputSource};
pub use expert_weights::ExpertWeights;
pub use feature::{Feature, FeatureAbs};
pub use feature_correlation::{FeatureCorrelation, Matching};
pub use gradients::{Gradients, WeightGradients};
pub use merged_output_error::{ErrorMapping, MergedOutputError};
pub use random::Random;
pub use router_logits::RouterLogits;
pub use router_weight_feature::RouterWeightFeature;
pub use router_weights::RouterWeights;
pub use token_outputs::TokenOutputs;
pub use weight_feature::WeightFeature;
