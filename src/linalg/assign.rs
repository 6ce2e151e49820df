//! The linear assignment problem: shortest augmenting paths, `O(n³)`.

use ndarray::ArrayView2;

use crate::error::{Error, Result};

/// A one-to-one choice of a column for every row.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// The column of each row.
    pub columns: Vec<u32>,
    /// Sum of the chosen gains.
    pub objective: f64,
    /// Upper bound on what the objective lacks to the optimum; 0 when exact.
    pub gap: f64,
}

/// The assignment of largest total gain.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when not square.
pub fn assign(gain: ArrayView2<'_, f32>) -> Result<Assignment> {
    let n = gain.nrows();
    if gain.ncols() != n {
        return Err(Error::shape("assignment", (n, n), gain.dim()));
    }
    let (mut u, mut v) = (vec![0.0f64; n + 1], vec![0.0f64; n + 1]);
    let mut row_of = vec![0usize; n + 1];
    for i in 1..=n {
        let mut way = vec![0usize; n + 1];
        let mut least = vec![f64::INFINITY; n + 1];
        let mut used = vec![false; n + 1];
        row_of[0] = i;
        let mut j0 = 0;
        loop {
            used[j0] = true;
            let (i0, mut delta, mut j1) = (row_of[j0], f64::INFINITY, 0);
            for j in 1..=n {
                if used[j] {
                    continue;
                }
                let reduced = -f64::from(gain[[i0 - 1, j - 1]]) - u[i0] - v[j];
                if reduced < least[j] {
                    (least[j], way[j]) = (reduced, j0);
                }
                if least[j] < delta {
                    (delta, j1) = (least[j], j);
                }
            }
            for j in 0..=n {
                if used[j] {
                    u[row_of[j]] += delta;
                    v[j] -= delta;
                } else {
                    least[j] -= delta;
                }
            }
            j0 = j1;
            if row_of[j0] == 0 {
                break;
            }
        }
        while j0 != 0 {
            row_of[j0] = row_of[way[j0]];
            j0 = way[j0];
        }
    }
    let mut columns = vec![0; n];
    (1..=n).for_each(|j| columns[row_of[j] - 1] = (j - 1) as u32);
    let chosen = columns.iter().enumerate();
    let objective = chosen.map(|(i, &j)| f64::from(gain[[i, j as usize]])).sum();
    Ok(Assignment { columns, objective, gap: 0.0 })
}

/// An assignment whose gain is within `relative_gap` of the best.
///
/// # Errors
/// As [`assign`].
pub fn assign_within(gain: ArrayView2<'_, f32>, _relative_gap: f64) -> Result<Assignment> {
    assign(gain)
}
