//! Recoverers that solve a linear system.

mod block_gauss_seidel;
mod by_tokens;
mod features;
mod held_out;
mod least_squares;
mod normal_equations;
mod scale;
mod subsample;
mod unit_scale;

pub(crate) use block_gauss_seidel::MAX_BLOCK;
pub(crate) use by_tokens::CHOICE_TOKENS;
pub use least_squares::LeastSquares;
pub(crate) use least_squares::Solver;
pub use scale::Scale;
pub use unit_scale::{Per, UnitScale};
