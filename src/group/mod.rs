//! Grouping methods: which experts of a layer become one. One method a file.
//!
//! | method | idea | source |
//! |---|---|---|
//! | [`Dominant`] | the most used experts stay, the others join the most similar | M-SMoE |
//! | [`Agglomerative`] | merge the closest groups until few enough remain | HC-SMoE |
//! | [`KMeans`] | the partition with the least spread inside its groups | HC-SMoE |
//! | [`Prune`] | the best experts stay, the others are dropped or redirected | REAP, EAN |
//! | [`Removal`] | the experts go whose removal is measured to cost least | NAEE |
//! | [`TaskSpecific`] | experts that a task does not use are dropped | M-SMoE, baseline |
//! | [`RandomGroups`] | chance | M-SMoE, baseline |
//!
//! All meet the budget exactly, keep protected experts alone, respect the capacity of groups and
//! number groups by their dominant expert. Ties are broken by score, then the smaller expert, then
//! the earlier layer. What cannot be met is an [`ErrorKind::Budget`](crate::ErrorKind::Budget) that
//! names what can.
//!
//! Each answers two questions in turn: how many groups a layer gets (`Quota`), and which
//! experts share one.
//!
//! ```
//! use mcsmoe::group::Dominant;
//! use mcsmoe::model::{Budget, LayerId, RoutingStats, SimilarityMatrix, Target};
//! use mcsmoe::stage::{Context, Grouper, LayerSummary};
//!
//! # fn main() -> mcsmoe::Result<()> {
//! // Four experts: 0 is like 1, and 2 is like 3.
//! let alike = |i, j| if i / 2 == j / 2 { 0.9 } else { 0.1 };
//! let layer = LayerSummary {
//!     id: LayerId::causal(0),
//!     similarity: SimilarityMatrix::from_pairs(4, |i, j| Ok((alike(i, j), 1.0 - alike(i, j))))?,
//!     stats: RoutingStats::from_counts(vec![40, 10, 20, 30], 100),
//!     candidates: None,
//! };
//! let budget = Budget::new(Target::PerLayer(2));
//! let groupings = Dominant::default().group(&[layer], &budget, &Context::cpu(0))?;
//! assert_eq!(groupings[0].members(0), [0, 1]);
//! assert_eq!(groupings[0].dominants(), [0, 3]);
//! # Ok(())
//! # }
//! ```

mod agglomerative;
mod clusters;
mod dendrogram;
mod dominant;
mod kmeans;
mod prune;
mod quota;
mod random;
mod ranking;
mod removal;
mod task_specific;

pub use agglomerative::Agglomerative;
pub use clusters::Representative;
pub use dendrogram::Linkage;
pub use dominant::Dominant;
pub use kmeans::KMeans;
pub use prune::{Absorb, Prune};
pub use quota::Spread;
pub use random::RandomGroups;
pub use ranking::{LayerScale, needs_of};
pub use removal::{Removal, Rest};
pub use task_specific::{TaskSpecific, UsageTracker};
