//! An expert: dense, or with its projections as low rank plus dense rows.

mod dense;
mod factored;
mod factored_expert;

pub use dense::{Expert, ExpertView, Linear, Role};
pub use factored::{Factored, Structure};
pub use factored_expert::{FactoredExpert, FactoredLayer, FactoredLinear, Weight};
