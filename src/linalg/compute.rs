//! What a device must be able to do: the few dense operations in which the arithmetic is.

use std::fmt::Debug;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::error::Result;

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

/// A device for dense `f32` matrices. Object-safe; the stages reach it through their context.
///
/// Results do not depend on the number of threads. All shapes are checked; nothing panics.
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

    /// The same device for use inside a task that already runs in parallel with others.
    ///
    /// The CPU answers with its sequential self: nested parallel loops would let a waiting thread
    /// start a second outer task and hold twice the memory.
    fn per_task(&self) -> Arc<dyn Compute>;
}
