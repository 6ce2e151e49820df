//! Recovery: a merged layer is refitted to what the original layer gave, on calibration tokens.
//!
//! | recoverer | what it fits | how |
//! |---|---|---|
//! | [`Scale`] | one factor per expert | in closed form |
//! | [`LeastSquares`] | all down projections of the layer together | in closed form |
//! | [`Distill`] | gate, up and down projections, router rows | by gradient descent |
//! | [`Chain`] | several of them in a row | – |
//!
//! No recoverer makes a layer worse on the rows that judge it
//! ([`Recovery::judging`](crate::stage::Recovery::judging)): what does not improve is returned as
//! it came.

mod adam;
mod chain;
mod distill;
mod features;
#[cfg(test)]
mod gradients;
mod kernels;
mod least_squares;
mod normal;
mod pupil;
mod routing;
mod scale;
mod student;

pub use chain::Chain;
pub use distill::Distill;
pub use least_squares::LeastSquares;
pub use scale::Scale;
