//! A weight matrix in factors: low rank plus structured sparse.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::check::Finite;

/// Whether the sparse part holds rows or columns of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Structure {
    /// Whole rows: output features (the paper).
    #[default]
    Rows,
    /// Whole columns: input features.
    Columns,
}

impl Structure {
    /// The axis along which rows or columns are picked.
    pub const fn axis(self) -> Axis {
        match self {
            Self::Rows => Axis(0),
            Self::Columns => Axis(1),
        }
    }

    /// The rows or columns `at` of a matrix, in their order.
    pub fn pick(self, a: ArrayView2<'_, f32>, at: &[u32]) -> Array2<f32> {
        let at: Vec<usize> = at.iter().map(|&i| i as usize).collect();
        a.select(self.axis(), &at)
    }

    /// The number of rows or columns of an `(m, n)` matrix.
    pub const fn count(self, (m, n): (usize, usize)) -> usize {
        match self {
            Self::Rows => m,
            Self::Columns => n,
        }
    }
}

/// `W ≈ L R + S` with `L: (m, r)`, `R: (r, n)` and `S` zero but for `k` kept rows or columns.
///
/// Finite, of fitting shapes, with ascending and distinct indices. Low rank only (`k = 0`) and
/// sparse only (`r = 0`) are both valid; neither is not.
///
/// A method that keeps rows of `W` itself, not of a residual, stores zeros in those rows of `L`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factored {
    left: Array2<f32>,
    right: Array2<f32>,
    structure: Structure,
    indices: Vec<u32>,
    kept: Array2<f32>,
}

impl Factored {
    /// Checks the parts. `kept` are the kept rows `(k, n)` or the kept columns `(m, k)`, in the
    /// order of `indices`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the parts do not fit each other,
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for indices that do not ascend or
    /// are beyond the matrix, and for `r = k = 0`;
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity.
    pub fn new(
        left: Array2<f32>,
        right: Array2<f32>,
        structure: Structure,
        indices: Vec<u32>,
        kept: Array2<f32>,
    ) -> Result<Self> {
        let (m, r, n, k) = (left.nrows(), left.ncols(), right.ncols(), indices.len());
        if right.nrows() != r {
            return Err(Error::shape("right factor", (r, n), right.dim()));
        }
        let expected = match structure {
            Structure::Rows => (k, n),
            Structure::Columns => (m, k),
        };
        if kept.dim() != expected {
            return Err(Error::shape("kept rows or columns", expected, kept.dim()));
        }
        let count = structure.count((m, n));
        let ascending = indices.windows(2).all(|w| w[0] < w[1]);
        if !ascending || indices.last().is_some_and(|&i| i as usize >= count) {
            let expected = format!("ascending numbers below {count}");
            return Err(Error::range(
                "indices of kept rows or columns",
                expected,
                format!("{indices:?}"),
            ));
        }
        if r == 0 && k == 0 {
            return Err(Error::range("factored matrix", "a rank or kept rows above 0", "neither"));
        }
        left.check_finite("left factor")?;
        right.check_finite("right factor")?;
        kept.check_finite("kept rows or columns")?;
        Ok(Self { left, right, structure, indices, kept })
    }

    /// Low rank only.
    ///
    /// # Errors
    /// As [`Factored::new`].
    pub fn low_rank(left: Array2<f32>, right: Array2<f32>) -> Result<Self> {
        let none = Array2::zeros((0, right.ncols()));
        Self::new(left, right, Structure::Rows, Vec::new(), none)
    }

    /// Kept rows or columns of an `(m, n)` matrix only.
    ///
    /// # Errors
    /// As [`Factored::new`].
    pub fn sparse(
        (m, n): (usize, usize),
        structure: Structure,
        indices: Vec<u32>,
        kept: Array2<f32>,
    ) -> Result<Self> {
        Self::new(Array2::zeros((m, 0)), Array2::zeros((0, n)), structure, indices, kept)
    }

    /// `(m, n)`.
    pub fn dim(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.ncols())
    }

    /// `r`.
    pub fn rank(&self) -> usize {
        self.left.ncols()
    }

    /// `L: (m, r)`.
    pub fn left(&self) -> ArrayView2<'_, f32> {
        self.left.view()
    }

    /// `R: (r, n)`.
    pub fn right(&self) -> ArrayView2<'_, f32> {
        self.right.view()
    }

    /// Whether rows or columns are kept.
    pub fn structure(&self) -> Structure {
        self.structure
    }

    /// Which ones, ascending.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The kept rows `(k, n)` or columns `(m, k)` of `S`.
    pub fn kept(&self) -> ArrayView2<'_, f32> {
        self.kept.view()
    }

    /// `L R + S: (m, n)`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn to_dense(&self, compute: &dyn Compute) -> Result<Array2<f32>> {
        let mut out = Array2::zeros(self.dim());
        if self.rank() > 0 {
            compute.gemm(1.0, self.left.view(), self.right.view(), 0.0, out.view_mut())?;
        }
        let axis = self.structure.axis();
        for (&i, row) in self.indices.iter().zip(self.kept.axis_iter(axis)) {
            let mut target = out.index_axis_mut(axis, i as usize);
            target += &row;
        }
        Ok(out)
    }

    /// `X Wᵀ` for `X: (t, n)`, without forming `W`: `(X Rᵀ) Lᵀ: (t, m)`, then `X Sᵀ` in the kept
    /// outputs, or from the kept inputs.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn forward(&self, x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Array2<f32>> {
        let (m, n) = self.dim();
        if x.ncols() != n {
            return Err(Error::shape("factored projection", (x.nrows(), n), x.dim()));
        }
        let mut out = Array2::zeros((x.nrows(), m));
        if self.rank() > 0 {
            let mut inner = Array2::zeros((x.nrows(), self.rank()));
            compute.gemm(1.0, x, self.right.t(), 0.0, inner.view_mut())?;
            compute.gemm(1.0, inner.view(), self.left.t(), 0.0, out.view_mut())?;
        }
        if self.indices.is_empty() {
            return Ok(out);
        }
        match self.structure {
            Structure::Rows => {
                let mut extra = Array2::zeros((x.nrows(), self.indices.len()));
                compute.gemm(1.0, x, self.kept.t(), 0.0, extra.view_mut())?;
                for (mut row, extra) in out.rows_mut().into_iter().zip(extra.rows()) {
                    self.indices.iter().zip(extra).for_each(|(&i, e)| row[i as usize] += e);
                }
            }
            Structure::Columns => {
                let at: Vec<usize> = self.indices.iter().map(|&i| i as usize).collect();
                let kept = x.select(Axis(1), &at);
                compute.gemm(1.0, kept.view(), self.kept.t(), 1.0, out.view_mut())?;
            }
        }
        Ok(out)
    }

    /// Numbers stored: `r (m + n) + k n` for rows, `r (m + n) + k m` for columns. The `k` indices
    /// are not counted; [`Factored::bytes`] has them.
    pub fn parameters(&self) -> usize {
        self.left.len() + self.right.len() + self.kept.len()
    }

    /// Floating-point operations for one token, a multiplication and an addition for each
    /// parameter: `2 r (m + n) + 2 k n` for rows.
    pub fn flops_per_token(&self) -> usize {
        2 * self.parameters()
    }

    /// Bytes stored with `per_value` bytes a number, and four for each index.
    pub fn bytes(&self, per_value: usize) -> usize {
        per_value * self.parameters() + size_of::<u32>() * self.indices.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::linalg::Cpu;
    use ndarray::array;

    fn rows() -> Factored {
        Factored::new(
            array![[1.0], [2.0], [0.0]],
            array![[1.0, -1.0]],
            Structure::Rows,
            vec![0, 2],
            array![[10.0, 0.0], [0.0, 5.0]],
        )
        .unwrap()
    }

    #[test]
    fn rows_by_hand() {
        let f = rows();
        let dense = array![[11.0, -1.0], [2.0, -2.0], [0.0, 5.0]];
        assert_eq!(f.to_dense(&Cpu::new()).unwrap(), dense);
        assert_eq!((f.dim(), f.rank()), ((3, 2), 1));
        assert_eq!((f.parameters(), f.flops_per_token(), f.bytes(2)), (9, 18, 26));
        let x = array![[1.0, 2.0], [-3.0, 0.5]];
        assert_eq!(f.forward(x.view(), &Cpu::new()).unwrap(), x.dot(&dense.t()));
        assert!(f.forward(array![[1.0]].view(), &Cpu::new()).is_err());
    }

    #[test]
    fn columns_low_rank_alone_and_rows_alone() {
        let (left, right) = (array![[1.0], [2.0]], array![[1.0, 0.0, 3.0]]);
        let kept = array![[4.0], [5.0]];
        let columns = Structure::Columns;
        let f = Factored::new(left.clone(), right.clone(), columns, vec![1], kept.clone()).unwrap();
        let low = Factored::low_rank(left, right).unwrap();
        let sparse = Factored::sparse((2, 3), columns, vec![1], kept).unwrap();
        let x = array![[1.0, -1.0, 2.0]];
        for (f, dense) in [
            (f, array![[1.0, 4.0, 3.0], [2.0, 5.0, 6.0]]),
            (low, array![[1.0, 0.0, 3.0], [2.0, 0.0, 6.0]]),
            (sparse, array![[0.0, 4.0, 0.0], [0.0, 5.0, 0.0]]),
        ] {
            assert_eq!(f.to_dense(&Cpu::new()).unwrap(), dense);
            assert_eq!(f.forward(x.view(), &Cpu::new()).unwrap(), x.dot(&dense.t()));
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let ok = rows();
        let new = |right: Array2<f32>, indices: &[u32], kept: Array2<f32>| {
            Factored::new(ok.left.clone(), right, Structure::Rows, indices.to_vec(), kept)
        };
        let right = || array![[1.0, -1.0]];
        let two = || Array2::ones((2, 2));
        assert!(new(right(), &[0, 2], two()).is_ok());
        for indices in [[2, 0], [1, 1], [0, 3]] {
            let error = new(right(), &indices, two()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::OutOfRange { .. }), "{error}");
        }
        assert!(new(Array2::ones((2, 2)), &[0, 2], two()).is_err());
        assert!(new(right(), &[0], two()).is_err());
        assert!(new(array![[f32::NAN, 1.0]], &[0, 2], two()).is_err());
        assert!(Factored::low_rank(Array2::zeros((3, 0)), Array2::zeros((0, 2))).is_err());
    }
}
