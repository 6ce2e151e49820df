//! Merging: one expert from the members of a group. One method a file.
//!
//! | merger | merged expert | needs |
//! |---|---|---|
//! | [`Weighted`] | weighted average of the aligned members; by usage it is M-SMoE's | counts |
//! | [`DominantOnly`] | the dominant member; the others are absorbed with weight 0 | – |
//! | [`Fisher`] | average weighted element by element by Fisher information | Fisher |
//! | [`ZipIt`] | hidden units zipped within and across members, most alike first | samples |
//! | [`FixDominant`] | members' hidden units folded into the dominant's (HC-SMoE) | samples |
//! | [`RegMean`] | each matrix by regression on the members' own inputs | samples |
//! | [`MergeMoe`] | averaged gate and up, down fitted to the members' combined output | samples |
//!
//! Members come with the permutations that align them; no merger looks for its own. [`router`] has
//! the methods that narrow the router's rows to the groups.
//!
//! ```
//! use mcsmoe::merge::DominantOnly;
//! use mcsmoe::model::{Expert, LayerId, MoeLayer, Permutation, Router, RoutingRule, RoutingStats};
//! use mcsmoe::stage::{Context, LayerView, Members, Merger};
//! use ndarray::Array2;
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let expert = |scale: f32| Expert::relu(Array2::eye(2), Array2::eye(2) * scale);
//! let router = Router::new(Array2::eye(2), None, None, RoutingRule::softmax(1, false))?;
//! let layer = MoeLayer::new(LayerId::causal(0), vec![expert(1.0)?, expert(3.0)?], router)?;
//! let stats = RoutingStats::from_counts(vec![1, 3], 4);
//! let experts: Vec<_> = layer.experts().iter().map(Expert::view).collect();
//! let members = Members {
//!     layer: LayerView::of(&layer, &stats),
//!     indices: &[0, 1],
//!     dominant: 1,
//!     experts: &experts,
//!     permutations: &[Permutation::identity(2), Permutation::identity(2)],
//! };
//! let merged = DominantOnly::default().merge(&members, &Context::cpu(0))?;
//! assert_eq!(&merged, &layer.experts()[1]);
//! # Ok(())
//! # }
//! ```

mod dominant;
mod fisher;
mod fix_dominant;
mod merge_moe;
mod normal;
mod reg_mean;
pub mod router;
mod units;
mod weighted;
mod zip;
mod zipit;

pub use dominant::DominantOnly;
pub use fisher::Fisher;
pub use fix_dominant::FixDominant;
pub use merge_moe::{MergeMoe, Wanted};
pub use reg_mean::RegMean;
pub use units::{Coefficients, Ingredient};
pub use weighted::{ReferenceCompat, Weighted, Weighting};
pub use zipit::ZipIt;
