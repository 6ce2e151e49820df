//! Which experts become one? One method a file.
//!
//! | method | idea | source |
//! |---|---|---|
//! | [`Dominant`] | the most used experts stay, the others join the most similar | M-SMoE |
//! | [`Agglomerative`] | merge the closest groups until few enough remain | HC-SMoE |
//! | [`Prune`] | the best experts stay, the others are dropped or redirected | REAP, EAN |
//!
//! All meet the budget exactly, keep protected experts alone, respect the capacity of groups and
//! number groups by their dominant expert. Ties are broken by score, then the smaller expert, then
//! the earlier layer. What cannot be met is an [`ErrorKind::Budget`](crate::ErrorKind::Budget) that
//! names what can.
//!
//! Each answers two questions in turn: how many groups does a layer get (`Quota`), and which
//! experts share one.

mod agglomerative;
mod clusters;
mod dendrogram;
mod dominant;
mod prune;
mod quota;
mod ranking;

pub use agglomerative::Agglomerative;
pub use clusters::Representative;
pub use dendrogram::Linkage;
pub use dominant::Dominant;
pub use prune::{Absorb, Prune};
pub use quota::Spread;
pub use ranking::{LayerScale, needs_of};
