//! Devices for dense products: what one must be able to do ([`Compute`]), and the CPU ([`Cpu`]).

mod activation;
pub(in crate::linalg) mod compute;
pub(in crate::linalg) mod cpu;
mod gradient;
mod mlp;

pub use activation::Activation;
pub(crate) use activation::{activate, gated};
pub use compute::{Compute, DeviceMatrix, Product, Term};
pub use cpu::Cpu;
#[cfg(feature = "gpu")]
pub(crate) use cpu::check_terms;
pub use mlp::{LinearView, Mlp};
#[cfg(feature = "gpu")]
pub(crate) use mlp::{add_bias, check_weights, hidden_by_parts, mlp_by_parts};
