//! The values that stages exchange: experts, routers, layers, groupings, statistics.
//!
//! Each is valid by construction: shapes fit, numbers are finite and indices are in range, so that
//! no stage has to check them again.
//!
//! ```
//! use mcsmoe::model::{Expert, LayerId, MoeLayer, Router, RoutingRule};
//! use ndarray::Array2;
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let experts = vec![Expert::relu(Array2::eye(2), Array2::eye(2))?; 3];
//! let router = |rows| Router::new(Array2::eye(2).select(ndarray::Axis(0), rows), None, None,
//!     RoutingRule::softmax(1, false));
//! let layer = MoeLayer::new(LayerId::causal(7), experts.clone(), router(&[0, 1, 0])?)?;
//! assert_eq!(layer.experts().len(), 3);
//! let error = MoeLayer::new(LayerId::causal(7), experts, router(&[0, 1])?).unwrap_err();
//! assert_eq!(error.to_string(), "layers.7: experts per router row: expected shape 2, found 3");
//! # Ok(())
//! # }
//! ```

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
