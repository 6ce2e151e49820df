//! The values that the rooms exchange. Each is valid by construction: shapes fit, numbers are
//! finite and indices are in range, so that no room has to check them again.

mod budget;
mod check;
mod expert;
mod grouping;
mod importance;
mod layer;
mod permutation;
mod router;
mod similarity;
mod stats;
mod tensors;
mod visits;

pub use budget::{Budget, Target};
pub use check::{Finite, non_finite};
pub use expert::{
    Expert, ExpertView, Factored, FactoredExpert, FactoredLayer, FactoredLinear, Linear, Role,
    Structure, Weight,
};
pub use grouping::{Grouping, Numbering};
pub use importance::Importance;
pub use layer::{LayerId, MergedLayer, MoeLayer, Stack};
pub use permutation::Permutation;
pub use router::{GroupScore, Router, Routing, RoutingGroups, RoutingRule, Score};
pub use similarity::{Measure, SimilarityMatrix};
pub use stats::{ExpertTensors, RoutingStats, Samples};
pub use tensors::TensorSource;
pub(crate) use visits::common;
pub use visits::{OutputSums, close_dropped};

pub use crate::linalg::{Activation, LinearView};
