//! Recovery: a merged layer is refitted to what the original layer gave, on calibration tokens.
//!
//! | recoverer | what it fits | how |
//! |---|---|---|
//! | [`LeastSquares`] | all down projections of the layer together | in closed form |
//!
//! No recoverer makes a layer worse on the rows that judge it
//! ([`Recovery::judging`](crate::stage::Recovery::judging)): what does not improve is returned as
//! it came.

mod features;
mod least_squares;
mod normal;

pub use least_squares::LeastSquares;
