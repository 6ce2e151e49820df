//! An orthonormal basis of the columns of a matrix, by Householder reflections in `f32`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder as reflect;
use faer::linalg::qr::no_pivoting::factor;
use faer::{Conj, Mat, Par};
use ndarray::{Array2, ArrayView2};

use super::bridge::{check_finite, to_array, to_faer};
use crate::error::Result;
use crate::linalg::registers::with_clean_registers;

/// A QR factorisation `A = Q R` with `A: (m, n)`, `k = min(m, n)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qr {
    /// `Q: (m, k)`, orthonormal columns also where `A` lacks rank.
    pub q: Array2<f32>,
    /// `R: (k, n)`, upper trapezoidal.
    pub r: Array2<f32>,
}

/// The thin QR factorisation of `A: (m, n)`; `4 m n k` operations on one thread, so the bits do
/// not depend on the number of threads.
///
/// # Errors
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity.
pub fn qr(a: ArrayView2<'_, f32>) -> Result<Qr> {
    check_finite("matrix of a QR factorisation", a)?;
    let (m, n) = a.dim();
    let k = m.min(n);
    if k == 0 {
        return Ok(Qr { q: Array2::zeros((m, 0)), r: Array2::zeros((0, n)) });
    }
    let block = factor::recommended_block_size::<f32>(m, n);
    let mut basis = to_faer(a);
    let mut coefficients = Mat::zeros(block, k);
    let scratch = factor::qr_in_place_scratch::<f32>(m, n, block, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    with_clean_registers(|| {
        let (basis, coefficients) = (basis.as_mut(), coefficients.as_mut());
        factor::qr_in_place(basis, coefficients, Par::Seq, stack, Default::default());
    });
    let upper = |(i, j)| if i <= j { basis[(i, j)] } else { 0.0 };
    let r = Array2::from_shape_fn((k, n), upper);
    let mut q = Mat::identity(m, k);
    let scratch =
        reflect::apply_block_householder_sequence_on_the_left_in_place_scratch::<f32>(m, block, k);
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    with_clean_registers(|| {
        reflect::apply_block_householder_sequence_on_the_left_in_place_with_conj(
            basis.get(.., ..k),
            coefficients.as_ref(),
            Conj::No,
            q.as_mut(),
            Par::Seq,
            stack,
        );
    });
    Ok(Qr { q: to_array(q.as_ref()), r })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn q_is_orthonormal_and_q_r_is_the_matrix() {
        for (m, n) in [(1, 1), (9, 4), (4, 9), (300, 60), (0, 3), (3, 0)] {
            let a = Array2::from_shape_fn((m, n), |(i, j)| ((i * i + 3 * j) % 11) as f32 - 5.0);
            let Qr { q, r } = qr(a.view()).unwrap();
            let k = m.min(n);
            assert!((q.t().dot(&q) - Array2::<f32>::eye(k)).iter().all(|e| e.abs() < 1e-5));
            let scale = 5.0 * (m as f32).sqrt();
            assert!((q.dot(&r) - &a).iter().all(|e| e.abs() < 1e-5 * scale), "{m}x{n}");
            assert!(r.indexed_iter().all(|((i, j), &x)| i <= j || x == 0.0));
        }
    }

    #[test]
    fn a_matrix_without_rank_still_gets_a_basis() {
        let q = qr(Array2::zeros((6, 3)).view()).unwrap().q;
        assert!((q.t().dot(&q) - Array2::<f32>::eye(3)).iter().all(|e| e.abs() < 1e-5));
        let nan = qr(ndarray::array![[f32::NAN]].view()).unwrap_err();
        assert!(matches!(nan.kind(), ErrorKind::NotFinite { .. }));
    }
}
