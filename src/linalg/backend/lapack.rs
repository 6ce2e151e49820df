//! The factorisations by LAPACK, through `ndarray-linalg`.

use ndarray::{Array2, ArrayView2, s};
use ndarray_linalg::{
    CholeskyInto, Diag, EigValshInto, EighInto, JobSvd, QRInto, SVDDCInto, SolveTriangularInto,
    UPLO,
};

use super::bridge::check_finite;
use super::eigh::Eigh;
use super::linalg_backend::LinalgBackend;
use super::qr::Qr;
use super::svd::Svd;
use crate::error::{Error, ErrorKind, Result};

/// LAPACK: `sgesdd`, `sgeqrf` and `sorgqr` (as LQ of the transpose), `dsyev`, `dpotrf`, `dtrtrs`.
///
/// Needs the feature `lapack` and a library that one of `lapack-openblas-system`,
/// `lapack-openblas-static`, `lapack-netlib-static`, `lapack-intel-mkl-static`, or the program,
/// links.
///
/// Every view is copied to row-major order first, which is the one that `ndarray-linalg` and
/// LAPACK's column-major order agree on for all shapes; it refuses views with gaps or reversed
/// axes. `dsyev` is the QR iteration: where eigenvectors are wanted it is slower than the divide
/// and conquer of [`PureRust`](super::PureRust).
///
/// Threads are those of the library, beside those of rayon: set `OPENBLAS_NUM_THREADS=1` (or
/// `MKL_NUM_THREADS=1`) where matrices are decomposed in parallel, which is everywhere in this
/// crate. Bits are the library's and may change with its version, its threads and the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lapack;

impl LinalgBackend for Lapack {
    fn name(&self) -> &str {
        "lapack"
    }

    fn svd(&self, a: ArrayView2<'_, f32>) -> Result<Svd> {
        check_finite("matrix of an SVD", a)?;
        let (m, n) = a.dim();
        if m == 0 || n == 0 {
            return Ok(Svd { u: Array2::zeros((m, 0)), s: Vec::new(), vt: Array2::zeros((0, n)) });
        }
        let found = copy(a).svddc_into(JobSvd::Some).map_err(|e| failure("SVD", e))?;
        let (Some(u), s, Some(vt)) = found else {
            return Err(failure("SVD", "no vectors came back"));
        };
        Ok(Svd { u: row_major(u), s: s.iter().map(|s| s.max(0.0)).collect(), vt: row_major(vt) })
    }

    fn singular_values(&self, a: ArrayView2<'_, f32>) -> Result<Vec<f32>> {
        check_finite("matrix of an SVD", a)?;
        if a.is_empty() {
            return Ok(Vec::new());
        }
        let (_, s, _) = copy(a).svddc_into(JobSvd::None).map_err(|e| failure("SVD", e))?;
        Ok(s.iter().map(|s| s.max(0.0)).collect())
    }

    fn qr(&self, a: ArrayView2<'_, f32>) -> Result<Qr> {
        check_finite("matrix of a QR factorisation", a)?;
        let (m, n) = a.dim();
        if m == 0 || n == 0 {
            return Ok(Qr { q: Array2::zeros((m, 0)), r: Array2::zeros((0, n)) });
        }
        let (q, r) = copy(a).qr_into().map_err(|e| failure("QR factorisation", e))?;
        Ok(Qr { q: row_major(q), r: row_major(r) })
    }

    fn eigh(&self, a: ArrayView2<'_, f64>) -> Result<Eigh> {
        let Some(full) = symmetric(a)? else {
            return Ok(Eigh { values: Vec::new(), vectors: Array2::zeros((0, 0)) });
        };
        let found = full.eigh_into(UPLO::Lower).map_err(|e| failure(EIGENVALUES, e))?;
        let (values, vectors) = found;
        let vectors = vectors.slice_move(s![.., ..;-1]);
        Ok(Eigh { values: values.iter().rev().copied().collect(), vectors: row_major(vectors) })
    }

    fn eigenvalues(&self, a: ArrayView2<'_, f64>) -> Result<Vec<f64>> {
        let Some(full) = symmetric(a)? else { return Ok(Vec::new()) };
        let values = full.eigvalsh_into(UPLO::Lower).map_err(|e| failure(EIGENVALUES, e))?;
        Ok(values.iter().rev().copied().collect())
    }

    fn cholesky(&self, gram: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
        let n = gram.nrows();
        if gram.dim() != (n, n) {
            return Err(Error::shape(CHOLESKY, (n, n), gram.dim()));
        }
        if n == 0 {
            return Ok(Array2::zeros((0, 0)));
        }
        let indefinite = |e: &dyn std::fmt::Display| {
            failure(CHOLESKY, format!("the matrix is not positive definite ({e})"))
        };
        let lower = Array2::from_shape_fn((n, n), |(i, j)| if j <= i { gram[[i, j]] } else { 0. });
        // Libraries differ in what they make of a NaN pivot: some go on.
        if let Some(bad) = lower.iter().find(|x| !x.is_finite()) {
            return Err(indefinite(bad));
        }
        let lower = lower.cholesky_into(UPLO::Lower).map_err(|e| indefinite(&e))?;
        match lower.iter().all(|x| x.is_finite()) {
            true => Ok(row_major(lower)),
            false => Err(indefinite(&"the factor is not finite")),
        }
    }

    fn solve_spd(
        &self,
        gram: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        let (n, m) = rhs.dim();
        if gram.dim() != (n, n) {
            return Err(Error::shape("Cholesky solve", (n, n), gram.dim()));
        }
        let lower = self.cholesky(gram)?;
        if n == 0 || m == 0 {
            return Ok(Array2::zeros((n, m)));
        }
        let half = triangular(lower.view(), rhs, UPLO::Lower)?;
        triangular(lower.t(), half.view(), UPLO::Upper)
    }

    fn solve_lower(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        check_triangular(lower, rhs)?;
        triangular(lower, rhs, UPLO::Lower)
    }

    fn solve_lower_transposed(
        &self,
        lower: ArrayView2<'_, f64>,
        rhs: ArrayView2<'_, f64>,
    ) -> Result<Array2<f64>> {
        check_triangular(lower, rhs)?;
        triangular(lower.reversed_axes(), rhs, UPLO::Upper)
    }
}

const EIGENVALUES: &str = "symmetric eigenvalues";
const CHOLESKY: &str = "Cholesky factorisation";
const TRIANGULAR: &str = "triangular solve";

/// A row-major copy of a view of any strides.
fn copy<T: Copy>(a: ArrayView2<'_, T>) -> Array2<T> {
    Array2::from_shape_fn(a.dim(), |at| a[at])
}

/// The same numbers in row-major order, as every other result has them.
fn row_major<T: Copy>(a: Array2<T>) -> Array2<T> {
    if a.is_standard_layout() { a } else { copy(a.view()) }
}

/// The lower triangle on both sides, since which one is read depends on the order of the copy;
/// `None` for an empty matrix.
fn symmetric(a: ArrayView2<'_, f64>) -> Result<Option<Array2<f64>>> {
    let n = a.nrows();
    if a.dim() != (n, n) {
        return Err(Error::shape(EIGENVALUES, (n, n), a.dim()));
    }
    check_finite("symmetric matrix", a)?;
    let full = Array2::from_shape_fn((n, n), |(i, j)| a[[i.max(j), i.min(j)]]);
    Ok((n > 0).then_some(full))
}

fn check_triangular(lower: ArrayView2<'_, f64>, rhs: ArrayView2<'_, f64>) -> Result<()> {
    let n = rhs.nrows();
    if lower.dim() != (n, n) {
        return Err(Error::shape(TRIANGULAR, (n, n), lower.dim()));
    }
    check_finite("right-hand side of a triangular solve", rhs)
}

/// Solves `T X = B` for the triangle `which` of `T: (n, n)`.
fn triangular(
    t: ArrayView2<'_, f64>,
    rhs: ArrayView2<'_, f64>,
    which: UPLO,
) -> Result<Array2<f64>> {
    if let Some(i) = t.diag().iter().position(|&x| x == 0.0) {
        return Err(failure(TRIANGULAR, format!("entry {i} of the diagonal is 0")));
    }
    if rhs.is_empty() {
        return Ok(Array2::zeros(rhs.dim()));
    }
    let x = copy(t).solve_triangular_into(which, Diag::NonUnit, copy(rhs));
    let x = row_major(x.map_err(|e| failure(TRIANGULAR, e))?);
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => Err(failure(TRIANGULAR, "the solution is not finite")),
    }
}

fn failure(operation: &'static str, reason: impl ToString) -> Error {
    ErrorKind::Numerical { operation, reason: reason.to_string() }.into()
}
