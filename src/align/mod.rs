//! Alignment of hidden units before an average: one method a file, and the choice of a reference.
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
//!
//! ```
//! use mcsmoe::align::WeightMatching;
//! use mcsmoe::model::Expert;
//! use mcsmoe::stage::{AlignPair, Aligner, Context};
//! use ndarray::array;
//!
//! # fn main() -> mcsmoe::Result<()> {
//! // The same expert, its two hidden units in the other order.
//! let reference = Expert::relu(array![[1.0, 0.0], [0.0, 2.0]], array![[1.0, 3.0], [0.0, 0.0]])?;
//! let target = Expert::relu(array![[0.0, 2.0], [1.0, 0.0]], array![[3.0, 1.0], [0.0, 0.0]])?;
//! let (reference, target) = (reference.view(), target.view());
//! let pair = AlignPair { reference, target, inputs: None };
//! let order = WeightMatching::default().align(&pair, &Context::cpu(0))?;
//! assert_eq!(order.as_slice(), [1, 0]);
//! # Ok(())
//! # }
//! ```

mod activation_matching;
mod identity;
mod reference;
mod weight_matching;

pub use activation_matching::ActivationMatching;
pub use identity::Identity;
pub(crate) use reference::{PARALLEL_THRESHOLD, align_members, reference_of};
pub use reference::{Reference, align_groups, align_layer};
pub use weight_matching::WeightMatching;
