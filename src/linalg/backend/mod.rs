//! Decompositions and solves, and backends that offer all of them as one object
//! ([`LinalgBackend`]): pure Rust ([`PureRust`]), or LAPACK with the feature `lapack`.

mod bridge;
mod cholesky;
mod eigh;
#[cfg(feature = "lapack")]
mod lapack;
mod linalg_backend;
mod qr;
mod rsvd;
mod svd;
mod triangular;
mod truncated;

pub use cholesky::{cholesky, solve_spd};
pub use eigh::{Eigh, eigenvalues, eigh};
#[cfg(feature = "lapack")]
pub use lapack::Lapack;
pub use linalg_backend::{LinalgBackend, PureRust};
pub(crate) use linalg_backend::{mean_eigenvalue, renew};
pub use qr::{Qr, qr};
pub use rsvd::{Randomized, RandomizedSvd, rsvd};
pub use svd::{Svd, singular_values, svd};
pub use triangular::{solve_lower, solve_lower_transposed};
pub use truncated::{SvdMethod, truncated_svd};
