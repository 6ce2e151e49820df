//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), and the linear assignment ([`assign`]).

mod assign;
mod compute;
mod cpu;

pub use assign::{Assignment, assign, assign_within};
pub use compute::{Compute, Term};
pub use cpu::Cpu;
