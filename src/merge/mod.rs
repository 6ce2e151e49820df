//! One expert from a group, and the router afterwards. One method a file.
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
//! Members arrive with the permutations that line them up; no merger looks for its own. [`router`]
//! holds what becomes of the router when its rows are narrowed to the groups.

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
