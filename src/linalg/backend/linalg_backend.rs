//! The linear-algebra backend: pure Rust by default, LAPACK where it was asked for.

use std::fmt::Debug;

use ndarray::{Array2, ArrayView2, Axis, ShapeBuilder, s};

use super::cholesky::{cholesky, solve_spd, solve_spd_in};
use super::eigh::{Eigh, eigenvalues, eigh};
use super::qr::{Qr, qr};
use super::svd::{Svd, singular_values, svd};
use super::triangular::{solve_lower, solve_lower_transposed};
use crate::error::Result;
use crate::par;

/// A linear-algebra backend: dense factorisations and solves. Object-safe; stages reach it through
/// their context.
///
/// Views may have any strides. Every implementation refuses the same input with the same kind of
/// error and orders values the same way: largest first. Two of them agree on products and values
/// to rounding, never on the signs of vectors.
pub trait LinalgBackend: Debug + Send + Sync {
    /// The name for reports, e.g. `pure-rust`.
    fn name(&self) -> &str;

    /// The thin SVD of `A: (m, n)`; see [`svd()`].
    ///
    /// # Errors
    /// As [`svd()`].
    fn svd(&self, a: ArrayView2<'_, f32>) -> Result<Svd>;

    /// Its singular values alone; see [`singular_values`].
    ///
    /// # Errors
    /// As [`singular_values`].
    fn singular_values(&self, a: ArrayView2<'_, f32>) -> Result<Vec<f32>>;

    /// The thin QR factorisation of `A: (m, n)`; see [`qr()`].
    ///
    /// # Errors
    /// As [`qr()`].
    fn qr(&self, a: ArrayView2<'_, f32>) -> Result<Qr>;

    /// The eigendecomposition of a symmetric `A: (n, n)`; see [`eigh()`].
    ///
    /// # Errors
    /// As [`eigh()`].
    fn eigh(&self, a: ArrayView2<'_, f64>) -> Result<Eigh>;

    /// Its eigenvalues alone; see [`eigenvalues`].
    ///
    /// # Errors
    /// As [`eigenvalues`].
    fn eigenvalues(&self, a: ArrayView2<'_, f64>) -> Result<Vec<f64>>;

    /// The lower Cholesky factor of `G: (n, n)`; see [`cholesky()`].
    ///
    /// # Errors
    /// As [`cholesky()`].
    fn cholesky(&self, gram: ArrayView2<'_, f64>) -> Result<Array2<f64>>;

    /// Solves `G X = B` by Cholesky; see [`solve_spd`].
    ///
    /// # Errors
    /// As [`solve_spd`].
    fn solve_spd(&self, gram: ArrayView2<'_, f64>, rhs: ArrayView2<'_, f64>)
    -> Result<Array2<f64>>;

    /// Solves `(G + λ I) X = B`. What `G` holds afterwards is of no use: its place may be taken by
    /// the factor. In column order it is quickest.
    ///
    /// # Errors
    /// As [`solve_spd`].
    fn solve_ridged(
        &self,
        gram: &mut Array2<f64>,
        lambda: f64,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        gram.diag_mut().mapv_inplace(|x| x + lambda);
        self.solve_spd(gram.view(), rhs)
    }

    /// Solves `L X = B`; see [`solve_lower`].
    ///
    /// # Errors
    /// As [`solve_lower`].
    fn solve_lower(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>>;

    /// Solves `Lᵀ X = B`; see [`solve_lower_transposed`].
    ///
    /// # Errors
    /// As [`solve_lower_transposed`].
    fn solve_lower_transposed(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>>;
}

/// `tr(G) / rank`: the mean of the eigenvalues that can differ from 0, what ridges are relative to.
pub(crate) fn mean_eigenvalue(gram: &Array2<f64>, rank: usize) -> f64 {
    gram.diag().sum() / rank.max(1) as f64
}

/// Columns of a matrix that one task copies.
const COLUMNS: usize = 64;

/// Copies `G: (n, n)` into `place`, which [`LinalgBackend::solve_ridged`] may overwrite: in column
/// order, in parallel, and without new memory where `place` has its size.
pub(crate) fn renew(place: &mut Array2<f64>, gram: &Array2<f64>) -> Result<()> {
    if place.dim() != gram.dim() {
        *place = Array2::zeros(gram.dim().f());
    }
    let mut parts: Vec<_> = place.axis_chunks_iter_mut(Axis(1), COLUMNS).collect();
    par::map_mut(&mut parts, |i, to| {
        let columns = i * COLUMNS..i * COLUMNS + to.ncols();
        to.assign(&gram.slice(s![.., columns]));
        Ok(())
    })?;
    Ok(())
}

/// The default backend: pure Rust, the same bits at any number of threads. Cholesky runs
/// in parallel, the others on one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PureRust;

impl LinalgBackend for PureRust {
    fn name(&self) -> &str {
        "pure-rust"
    }

    fn svd(&self, a: ArrayView2<'_, f32>) -> Result<Svd> {
        svd(a)
    }

    fn singular_values(&self, a: ArrayView2<'_, f32>) -> Result<Vec<f32>> {
        singular_values(a)
    }

    fn qr(&self, a: ArrayView2<'_, f32>) -> Result<Qr> {
        qr(a)
    }

    fn eigh(&self, a: ArrayView2<'_, f64>) -> Result<Eigh> {
        eigh(a)
    }

    fn eigenvalues(&self, a: ArrayView2<'_, f64>) -> Result<Vec<f64>> {
        eigenvalues(a)
    }

    fn cholesky(&self, gram: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
        cholesky(gram)
    }

    fn solve_spd(
        &self,
        gram: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        solve_spd(gram, rhs)
    }

    fn solve_ridged(
        &self,
        gram: &mut Array2<f64>,
        lambda: f64,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        gram.diag_mut().mapv_inplace(|x| x + lambda);
        solve_spd_in(gram, rhs)
    }

    fn solve_lower(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        solve_lower(lower, rhs)
    }

    fn solve_lower_transposed(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        solve_lower_transposed(lower, rhs)
    }
}
