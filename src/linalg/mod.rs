//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]).

mod compute;
mod cpu;

pub use compute::{Compute, Term};
pub use cpu::Cpu;
