//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), the linear assignment ([`assign`]) and [`correlation`].

mod assign;
mod compute;
mod correlation;
mod cpu;

pub use assign::{Assignment, assign, assign_within};
pub use compute::{Compute, Term};
pub use correlation::correlation;
pub use cpu::Cpu;
