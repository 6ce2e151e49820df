//! Backends for decompositions and solves: all of them as an object ([`Factorise`]), in pure Rust
//! ([`PureRust`]) or by LAPACK (`Lapack`, with the feature `lapack`).

mod bridge;
mod cholesky;
mod eigh;
mod factorise;
#[cfg(feature = "lapack")]
mod lapack;
mod qr;
mod rsvd;
mod svd;
mod triangular;
mod truncated;

pub use cholesky::{cholesky, solve_spd};
pub use eigh::{Eigh, eigenvalues, eigh};
pub use factorise::{Factorise, PureRust};
pub(crate) use factorise::{mean_eigenvalue, renew};
#[cfg(feature = "lapack")]
pub use lapack::Lapack;
pub use qr::{Qr, qr};
pub use rsvd::{Randomized, RandomizedSvd, rsvd};
pub use svd::{Svd, singular_values, svd};
pub use triangular::{solve_lower, solve_lower_transposed};
pub use truncated::{SvdMethod, truncated_svd};
