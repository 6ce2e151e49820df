//! Recovery: a merged layer is refitted to what the original layer gave, on calibration tokens.
//!
//! | recoverer | what it fits | how |
//! |---|---|---|
//! | [`Scale`] | one factor per expert | in closed form |
//! | [`UnitScale`] | one factor per hidden unit, or per output of an expert | in closed form |
//! | [`LeastSquares`] | all down projections of the layer together | in closed form |
//! | [`Distill`] | gate, up and down projections, router rows | by gradient descent |
//! | [`Paper`] | gate, up and down projections, on the paper's losses | by gradient descent |
//! | [`Chain`] | several of them in a row | – |
//!
//! No recoverer makes a layer worse on the rows that judge it
//! ([`Recovery::judging`](crate::stage::Recovery::judging)): what does not improve is returned as
//! it came.

mod adam;
mod best;
mod chain;
mod course;
mod distill;
mod dual;
mod features;
#[cfg(test)]
mod gradients;
mod jury;
mod kernels;
mod least_squares;
mod normal;
mod paper;
mod pupil;
mod routing;
mod scale;
mod student;
mod thinned;
mod unit_scale;

pub use chain::Chain;
pub use distill::Distill;
pub(crate) use dual::CHOOSING;
pub use least_squares::LeastSquares;
pub(crate) use least_squares::Solver;
pub use paper::{HiddenLoss, Paper};
pub use scale::Scale;
pub use unit_scale::{Per, UnitScale};
