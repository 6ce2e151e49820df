//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), and, one a file, what is always solved on the CPU: the linear
//! assignment ([`assign`]), [`correlation`], the factorisations ([`svd()`], [`truncated_svd`],
//! [`rsvd`], [`qr()`], [`eigh()`], [`cholesky()`]) and `f64` systems ([`add_cross`],
//! [`solve_spd`], [`solve_lower`]). [`Activation`] and [`Mlp`] are what a device must know of an
//! expert. Factorisations run on one thread: give each parallel task its own matrix.
//! [`LinalgBackend`] is all of them as an object: [`PureRust`], or `Lapack` with the feature
//! `lapack`. [`exp`](exp()) is the one scalar kernel that several rooms vectorise.

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
pub use correlation::correlation;
pub(crate) use cross::add_pairs;
pub use cross::{add_cross, add_own};
pub use device::{Activation, Compute, Cpu, DeviceMatrix, LinearView, Mlp, Product, Term};
pub(crate) use device::{activate, gated};
#[cfg(feature = "gpu")]
pub(crate) use device::{add_bias, check_terms, check_weights, hidden_by_parts, mlp_by_parts};
pub use exp::{exp, vectorised};
pub(crate) use kernel::{Kernel, Rows};
