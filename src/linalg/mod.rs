//! Dense linear algebra: devices, decompositions, and linear assignment.
//!
//! - A device multiplies `f32` matrices ([`Compute`]): the processor ([`Cpu`]) or, with the feature
//!   `gpu`, a graphics card. [`Mlp`], [`LinearView`] and [`Activation`] describe an expert to it.
//! - A backend decomposes and solves ([`LinalgBackend`]): pure Rust ([`PureRust`]) or, with the
//!   feature `lapack`, LAPACK. Decompositions run on one thread: give each parallel task its own
//!   matrix. [`truncated_svd`] and [`rsvd`] use both a device and a backend.
//! - [`assign`] solves the linear assignment problem.
//!
//! ```
//! use mcsmoe::linalg::{Compute, Cpu, LinalgBackend, PureRust};
//! use ndarray::{Array2, array};
//!
//! # fn main() -> mcsmoe::Result<()> {
//! let a = array![[3.0, 0.0], [0.0, -2.0]];
//! let mut square = Array2::zeros((2, 2));
//! Cpu::new().gemm(1.0, a.view(), a.view(), 0.0, square.view_mut())?;
//! assert_eq!(square, array![[9.0, 0.0], [0.0, 4.0]]);
//! let values = PureRust.singular_values(a.view())?;
//! assert!((values[0] - 3.0).abs() < 1e-5 && (values[1] - 2.0).abs() < 1e-5);
//! # Ok(())
//! # }
//! ```

mod assign;
mod backend;
mod correlation;
mod cross;
mod device;
mod exp;
mod kernel;
mod registers;

pub use assign::{Assignment, assign, assign_within};
#[cfg(feature = "lapack")]
pub use backend::Lapack;
pub use backend::{
    Eigh, LinalgBackend, PureRust, Qr, Randomized, RandomizedSvd, Svd, SvdMethod, cholesky,
    eigenvalues, eigh, qr, rsvd, singular_values, solve_lower, solve_lower_transposed, solve_spd,
    svd, truncated_svd,
};
pub(crate) use backend::{mean_eigenvalue, renew};
pub(crate) use correlation::correlation;
pub(crate) use cross::{add_cross, add_own, add_pairs};
pub use device::{Activation, Compute, Cpu, DeviceMatrix, LinearView, Mlp, Product, Term};
pub(crate) use device::{activate, gated};
#[cfg(feature = "gpu")]
pub(crate) use device::{add_bias, check_terms, check_weights, hidden_by_parts, mlp_by_parts};
pub(crate) use exp::{exp, vectorised};
pub(crate) use kernel::{Kernel, Rows};
