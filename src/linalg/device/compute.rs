//! The operations of a device: the few dense ones in which nearly all arithmetic is.

use std::fmt::Debug;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use super::mlp::{Mlp, hidden_by_parts, mlp_by_parts};
use crate::error::{Error, Result};

/// One term of a [`Compute::weighted_sum`]: `weight · matrix[rows, cols]`.
///
/// `rows` and `cols` are gather indices (entry `a` of the result comes from entry `rows[a]`);
/// `None` leaves that axis alone. This is how a hidden-unit permutation is applied without a copy
/// of the expert.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// The scalar coefficient.
    pub weight: f32,
    /// The matrix.
    pub matrix: ArrayView2<'a, f32>,
    /// Gather indices of the rows.
    pub rows: Option<&'a [u32]>,
    /// Gather indices of the columns.
    pub cols: Option<&'a [u32]>,
}

impl<'a> Term<'a> {
    /// `weight · matrix`, not permuted.
    pub fn plain(weight: f32, matrix: ArrayView2<'a, f32>) -> Self {
        Self { weight, matrix, rows: None, cols: None }
    }
}

/// One term of a [`Compute::gemm_sum`]: `alpha · A B`.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The scalar coefficient.
    pub alpha: f32,
    /// `A: (m, k)`, of any strides.
    pub a: ArrayView2<'a, f32>,
    /// `B: (k, n)`, of any strides.
    pub b: ArrayView2<'a, f32>,
}

/// A matrix `A: (m, n)` in a device's own memory, for repeated products.
pub trait DeviceMatrix: Debug + Send + Sync {
    /// `out ← A B`, or `out ← Aᵀ B` if `transposed`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the shapes do not fit.
    fn multiply(
        &self,
        transposed: bool,
        b: ArrayView2<'_, f32>,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<()>;

    /// `Σ_j A[i, j]²` of every row, accumulated beyond `f32`.
    ///
    /// # Errors
    /// Of the device only.
    fn row_squares(&self) -> Result<Vec<f64>>;
}

/// A device for dense `f32` matrices. Object-safe; the stages reach it through their context.
///
/// Results do not depend on the number of threads. All shapes are checked; nothing panics.
///
/// Four methods are required. The others say the same in terms of these, and are overridden by a
/// device with a memory of its own, where every product that goes in and out alone costs a copy:
/// a sum of products, a whole MLP, a matrix that is multiplied many times.
pub trait Compute: Debug + Send + Sync {
    /// The device's name, for reports (`"cpu"`, or the adapter's name).
    fn name(&self) -> &str;

    /// `out ← alpha · A B + beta · out` for `A: (m, k)`, `B: (k, n)`, `out: (m, n)`, of any
    /// strides: `A Bᵀ` is `gemm(.., a, b.t(), ..)`. With `beta = 0` the old content of `out` is
    /// not read.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the three shapes do not fit.
    fn gemm(
        &self,
        alpha: f32,
        a: ArrayView2<'_, f32>,
        b: ArrayView2<'_, f32>,
        beta: f32,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<()>;

    /// `gram ← gram + Xᵀ X` for `X: (t, p)`, `gram: (p, p)`, accumulated in `f64`.
    ///
    /// Second moments feed Cholesky factorisations, whose small pivots are what `f32` would lose.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the shapes do not fit.
    fn add_gram(&self, x: ArrayView2<'_, f32>, gram: &mut Array2<f64>) -> Result<()>;

    /// `Σ weight · matrix[rows, cols]` over `terms`, added in their order.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when a term has another shape than the first
    /// or its gather indices do not fit; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange)
    /// when there is no term.
    fn weighted_sum(&self, terms: &[Term<'_>]) -> Result<Array2<f32>>;

    /// `out ← Σ alpha A B` over `terms`, added in their order; 0 without terms.
    ///
    /// # Errors
    /// As [`Compute::gemm`].
    fn gemm_sum(&self, terms: &[Product<'_>], mut out: ArrayViewMut2<'_, f32>) -> Result<()> {
        let Some((first, rest)) = terms.split_first() else {
            out.fill(0.0);
            return Ok(());
        };
        self.gemm(first.alpha, first.a, first.b, 0.0, out.view_mut())?;
        rest.iter().try_for_each(|term| self.gemm(term.alpha, term.a, term.b, 1.0, out.view_mut()))
    }

    /// Hidden activations of an MLP, the input of its down projection, for `X: (t, d_model)`:
    /// `(t, d_ff)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    fn hidden(&self, mlp: &Mlp<'_>, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        hidden_by_parts(mlp, x, self)
    }

    /// `out ← w ⊙ E(X)`: the MLP `E` on every row of `X: (t, d_model)`, times one weight a row (the
    /// router's), if given; `out: (t, d_model)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the shapes do not fit.
    fn mlp(
        &self,
        mlp: &Mlp<'_>,
        x: ArrayView2<'_, f32>,
        weights: Option<&[f32]>,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<()> {
        if out.dim() != (x.nrows(), mlp.down.weight.nrows()) {
            return Err(Error::shape("mlp", (x.nrows(), mlp.down.weight.nrows()), out.dim()));
        }
        mlp_by_parts(mlp, x, weights, out, self)
    }

    /// Whether [`Compute::mlp`] is more than its parts; a caller with buffers of its own, which
    /// suit the CPU, asks before it goes part by part.
    fn fuses(&self) -> bool {
        false
    }

    /// Copies the matrix to the device's own memory; `None` from a device without one, whose caller
    /// multiplies by [`Compute::gemm`].
    ///
    /// # Errors
    /// Of the device only.
    fn upload<'a>(&'a self, a: ArrayView2<'a, f32>) -> Result<Option<Box<dyn DeviceMatrix + 'a>>> {
        let _ = a;
        Ok(None)
    }

    /// The same device for use inside a task that already runs in parallel with others.
    ///
    /// The CPU answers with its sequential self: nested parallel loops would let a waiting thread
    /// start a second outer task and hold twice the memory.
    fn per_task(&self) -> Arc<dyn Compute>;
}
