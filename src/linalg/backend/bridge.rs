//! Conversions between `ndarray`, which the crate's API uses, and `faer`, which decomposes.

use faer::{Mat, MatRef};
use ndarray::{Array2, ArrayView2};

use crate::error::{ErrorKind, Result};

/// A column-major copy, the layout in which `faer` factorises.
pub(super) fn to_faer<T: Copy>(a: ArrayView2<'_, T>) -> Mat<T> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| a[[i, j]])
}

/// A row-major copy.
pub(super) fn to_array<T: Copy>(a: MatRef<'_, T>) -> Array2<T> {
    Array2::from_shape_fn((a.nrows(), a.ncols()), |(i, j)| a[(i, j)])
}

/// Fails on the first NaN or infinity: the factorisations loop on them or answer with more.
pub(super) fn check_finite<T: Copy + Into<f64>>(what: &str, a: ArrayView2<'_, T>) -> Result<()> {
    match a.iter().map(|&x| x.into()).enumerate().find(|(_, x)| !x.is_finite()) {
        None => Ok(()),
        Some((index, value)) => {
            Err(ErrorKind::NotFinite { what: what.into(), value, index }.into())
        }
    }
}
