//! In which order do hidden units line up? One method a file, and the policy of who lines up with
//! whom.
//!
//! An expert computes the same function whatever the order of its hidden units, so two experts that
//! learned the same can look unrelated entry by entry. An [`Aligner`](crate::stage::Aligner)
//! answers with the permutation of one expert's units that makes it most like another's;
//! [`align_groups`] and [`align_layer`] decide which expert keeps its order, the [`Reference`].
//!
//! | method | compares | needs |
//! |---|---|---|
//! | [`Identity`] | nothing | – |
//! | [`WeightMatching`] (paper) | weights of the units | – |
//! | [`ActivationMatching`] (paper) | what the units do on real inputs | samples |

mod activation_matching;
mod identity;
mod reference;
mod weight_matching;

pub use activation_matching::ActivationMatching;
pub use identity::Identity;
pub use reference::{
    PARALLEL_THRESHOLD, Reference, align_groups, align_layer, align_members, reference_of,
};
pub use weight_matching::WeightMatching;
