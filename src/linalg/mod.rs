//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), and, one a file, what is always solved in `f64` on the CPU.

mod cholesky;
mod compute;
mod cpu;

pub use cholesky::solve_spd;
pub use compute::{Compute, Term};
pub use cpu::Cpu;
