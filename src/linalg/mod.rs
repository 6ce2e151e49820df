//! Dense linear algebra on `f32` matrices: what the rooms may ask of a device ([`Compute`]), the
//! CPU that answers ([`Cpu`]), and, one a file, what is always solved on the CPU: the linear
//! assignment ([`assign`]), [`correlation`], the factorisations ([`svd()`], [`truncated_svd`],
//! [`rsvd`], [`qr()`], [`eigh()`], [`cholesky()`]) and `f64` systems ([`add_cross`],
//! [`solve_spd`], [`solve_lower`]). [`Activation`] and [`Mlp`] are what a device must know of an
//! expert. Factorisations run on one thread: give each parallel task its own matrix. [`Factorise`]
//! is all of them as an object: [`PureRust`], or `Lapack` with the feature `lapack`. [`exp`](exp())
//! is the one scalar kernel that several rooms vectorise.

mod activation;
mod assign;
mod bridge;
mod cholesky;
mod compute;
mod correlation;
mod cpu;
mod cross;
mod eigh;
mod exp;
mod factorise;
mod kernel;
#[cfg(feature = "lapack")]
mod lapack;
mod mlp;
mod qr;
mod registers;
mod rsvd;
mod svd;
mod triangular;
mod truncated;

pub use activation::Activation;
pub(crate) use activation::{activate, gated};
pub use assign::{Assignment, assign, assign_within};
pub use cholesky::{cholesky, solve_spd};
pub use compute::{Compute, Held, Product, Term};
pub use correlation::correlation;
pub use cpu::Cpu;
#[cfg(feature = "gpu")]
pub(crate) use cpu::check_terms;
pub(crate) use cross::add_pairs;
pub use cross::{add_cross, add_own};
pub use eigh::{Eigh, eigenvalues, eigh};
pub use exp::{exp, vectorised};
pub use factorise::{Factorise, PureRust};
pub(crate) use factorise::{mean_eigenvalue, renew};
pub(crate) use kernel::{Kernel, Rows};
#[cfg(feature = "lapack")]
pub use lapack::Lapack;
pub use mlp::{LinearView, Mlp};
#[cfg(feature = "gpu")]
pub(crate) use mlp::{add_bias, check_weights, hidden_by_parts, mlp_by_parts};
pub use qr::{Qr, qr};
pub use rsvd::{Randomized, RandomizedSvd, rsvd};
pub use svd::{Svd, singular_values, svd};
pub use triangular::{solve_lower, solve_lower_transposed};
pub use truncated::{SvdMethod, truncated_svd};
