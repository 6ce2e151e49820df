//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), and, one a file, what is always solved on the CPU: the linear
//! assignment ([`assign`]), [`correlation`], and `f64` systems ([`add_cross`], [`solve_spd`]).
//! [`exp`] is the one scalar kernel that several rooms vectorise.

mod assign;
mod cholesky;
mod compute;
mod correlation;
mod cpu;
mod cross;
mod exp;

pub use assign::{Assignment, assign, assign_within};
pub use cholesky::solve_spd;
pub use compute::{Compute, Term};
pub use correlation::correlation;
pub use cpu::Cpu;
pub use cross::add_cross;
pub use exp::exp;
