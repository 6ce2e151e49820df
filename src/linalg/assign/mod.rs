//! Linear assignment: the permutation `σ` that maximises `Σ_a gain[a, σ(a)]`.
//!
//! With prices `p` on the columns, weak duality bounds every assignment from above by
//! `Σ_j p_j + Σ_a max_j (gain[a, j] − p_j)`. The solver looks for an assignment and prices for
//! which the two sides meet:
//!
//! 1. [`warm`]: first prices, from the strongest common component of the gains if there is one;
//! 2. [`candidates`]: a short list of the best columns of each row, and a bound on the others;
//! 3. [`auction`]: rows bid, with a tolerance `ε` that shrinks;
//! 4. [`augment`]: the few rows left over are matched along shortest augmenting paths.
//!
//! Prices only rise from step 2 on. A bound on unlisted columns therefore never expires, and the
//! dense matrix is read again only by rows whose list no longer holds a certain answer.

mod auction;
mod augment;
mod candidates;
mod scan;
#[cfg(test)]
mod tests;
mod warm;

use std::borrow::Cow;

use ndarray::ArrayView2;
use pulp::Arch;

use self::auction::State;
use self::augment::Search;
use self::candidates::Candidates;
use crate::error::{Error, ErrorKind, Result};

/// The result of a maximising assignment.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// `columns[a]` is the column given to row `a`: a permutation of `0..n`.
    pub columns: Vec<u32>,
    /// `Σ_a gain[a, columns[a]]`, summed in `f64`.
    pub objective: f64,
    /// Upper bound on `optimum − objective`, certified by dual feasibility and widened by what
    /// `f64` may have rounded away, so never exactly zero unless the gains are.
    pub gap: f64,
}

/// The assignment of largest total gain: `argmax_σ Σ_a gain[a, σ(a)]` for `gain: (n, n)`.
///
/// Exact for the `f32` gains as given: prices are kept in `f64`, and the certified `gap` of the
/// result is what `f64` sums may have rounded away, `2⁻⁵¹ n (G + P) + 2⁻⁵³ n² G` with `G` the
/// largest magnitude of a gain and `P` of a price, plus the rounding of the prices themselves. The
/// tests hold the whole to `20 n² 2⁻⁵² G`. Which of several optima is returned is unspecified but
/// always the same.
///
/// Runs on the calling thread. A view in column order is solved as its transpose; any other
/// layout that is not dense is copied.
///
/// Cost: O(n³) in the worst case, which gains full of ties come near (`−|x − y|` for points on a
/// line). On gains without structure the matrix is read about three times. Memory: O(n) numbers
/// and 16 candidates a row, besides the matrix.
///
/// Sources: R. Jonker and A. Volgenant, *A shortest augmenting path algorithm for dense and
/// sparse linear assignment problems*, Computing 38 (1987); D. P. Bertsekas, *The auction
/// algorithm*, Annals of Operations Research 14 (1988). Ours: the candidate lists that make both
/// sparse, and first prices from a rank-one component.
///
/// # Errors
/// [`ErrorKind::Shape`] when `gain` is not square; [`ErrorKind::NotFinite`] when a gain is NaN or
/// infinite; [`ErrorKind::OutOfRange`] when there are more columns than a `u32` can tell apart.
///
/// # Examples
/// ```
/// let gain = ndarray::array![[9.0, 8.0, 1.0], [9.0, 1.0, 1.0], [2.0, 2.0, 1.0]];
/// let best = mcsmoe::linalg::assign(gain.view())?;
/// assert_eq!(best.columns, [1, 0, 2]);
/// assert_eq!(best.objective, 18.0);
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn assign(gain: ArrayView2<'_, f32>) -> Result<Assignment> {
    assign_within(gain, 0.0)
}

/// An assignment with `optimum − objective ≤ relative_gap · |objective|`, certified.
///
/// Stops the auction of [`assign`] as soon as the duals prove it; `relative_gap = 0` is [`assign`].
/// A gap that is smaller than the rounding of `f64` sums gives the exact assignment.
///
/// # Errors
/// Those of [`assign`]; [`ErrorKind::OutOfRange`] when `relative_gap` is negative or NaN.
pub fn assign_within(gain: ArrayView2<'_, f32>, relative_gap: f64) -> Result<Assignment> {
    let (n, columns) = gain.dim();
    if n != columns {
        return Err(Error::shape("assignment", (n, n), (n, columns)));
    }
    if relative_gap.is_nan() || relative_gap < 0.0 {
        return Err(Error::range("relative gap", "at least 0", relative_gap));
    }
    // Row numbers share a `u32` with column numbers in the search's queue.
    if n >= (u32::MAX / 2) as usize {
        return Err(Error::range("assignment size", "less than 2³¹", n));
    }
    let transposed = !gain.is_standard_layout() && gain.t().is_standard_layout();
    let view = if transposed { gain.reversed_axes() } else { gain };
    let dense: Cow<'_, [f32]> = match view.as_slice() {
        Some(slice) => slice.into(),
        None => view.iter().copied().collect(),
    };
    let solved = solve(&dense, n, relative_gap);
    if !transposed {
        return solved;
    }
    match solved {
        Ok(mut solved) => {
            solved.columns = inverse(&solved.columns);
            Ok(solved)
        }
        // The first offender in row order is another one than in column order.
        Err(error) => Err(gain
            .iter()
            .position(|g| !g.is_finite())
            .map_or(error, |index| not_finite(gain[[index / n, index % n]], index))),
    }
}

fn inverse(permutation: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; permutation.len()];
    for (a, &b) in permutation.iter().enumerate() {
        inverse[b as usize] = a as u32;
    }
    inverse
}

fn not_finite(value: f32, index: usize) -> Error {
    let (what, value) = ("assignment gain".to_owned(), f64::from(value));
    ErrorKind::NotFinite { what, value, index }.into()
}

/// First tolerance of the auction, relative to the standard deviation of the gains. On unrelated
/// gains 0.02 took two thirds of the time of 0.2 and half that of 1; hard gains hardly care.
const FIRST_EPSILON: f64 = 0.02;

/// What the tolerance is divided by from one phase to the next.
const SHRINK: f64 = 5.0;

/// Phases before the exact finish. More leave it fewer rows, but cost as much as they save.
const PHASES: usize = 3;

/// One row in so many may be free when the exact finish takes over.
const SETTLED: usize = 8;

/// Bids a row may make in a phase, on average, before the exact finish takes over. Few gains need
/// so many; 8 and 16 made blocks of equal gains three times as slow and rank two twice.
const BIDS: usize = 64;

fn solve(gain: &[f32], n: usize, relative_gap: f64) -> Result<Assignment> {
    let arch = Arch::new();
    let warm = warm::prices(arch, gain, n);
    let mut rows = Candidates::new(arch, gain, n, &warm.price)?;
    let mut state = State::new(warm.price);
    // Within ε of its best in every row is within n ε in all: this much is enough.
    let enough = relative_gap.min(1.0) * rows.upper_bound(&state.price).abs() / n.max(1) as f64;
    let mut epsilon = enough.max(FIRST_EPSILON * warm.noise);
    for _ in 0..PHASES {
        // With most rows settled, another phase costs more than the paths it would save.
        if state.release(&mut rows, epsilon) < n / SETTLED {
            break;
        }
        // A tolerance lost in the rounding of the prices would never end the phase.
        if epsilon <= rows.largest * 1e-12
            || !auction::phase(&mut rows, &mut state, epsilon, BIDS * n)
        {
            break;
        }
        if relative_gap > 0.0 {
            let found = certify(&state, rows.largest, |i| rows.at_most(i, &state.price));
            if found.gap <= relative_gap * found.objective.abs() {
                return Ok(found);
            }
        }
        epsilon = if epsilon > enough { enough.max(epsilon / SHRINK) } else { epsilon / SHRINK };
    }
    finish(&mut rows, &mut state);
    Ok(certify(&state, rows.largest, |i| scan::best(arch, rows.row(i), &state.price)))
}

/// From approximate to exact: rows that are not at their best bid without tolerance, twice each
/// on average; those still free are matched one by one.
fn finish(rows: &mut Candidates<'_>, state: &mut State) {
    state.release(rows, 0.0);
    auction::phase(rows, state, 0.0, 2 * rows.n);
    let mut search = Search::new(rows.n);
    for i in 0..rows.n {
        if state.is_free(i) {
            search.augment(rows, state, i);
        }
    }
}

/// The assignment of `state`, and its distance from the dual bound.
///
/// The gap is the sum of the rows' regrets `max_j (gain[i, j] − p_j) − (gain[i, σ(i)] − p_σ(i))`,
/// in which the prices cancel: none is negative, so nothing of the size of the objective is
/// subtracted. `at_most(i)` bounds the maximum. Each regret carries four roundings of values up
/// to `G + P`, and the objective up to `n` of partial sums up to `n G`.
fn certify(state: &State, largest: f64, at_most: impl Fn(usize) -> f64) -> Assignment {
    let (n, mut regret, mut objective) = (state.gain_of.len(), 0.0, 0.0);
    for (i, (&j, &gain)) in state.column_of.iter().zip(&state.gain_of).enumerate() {
        regret += (at_most(i) - (gain - state.price[j as usize])).max(0.0);
        objective += gain;
    }
    let highest = state.price.iter().fold(0.0, |p: f64, x| p.max(x.abs()));
    let (size, unit) = (n as f64, f64::EPSILON / 2.0);
    let rounding = size * 4.0 * unit * (largest + highest) + size * size * unit * largest;
    let gap = regret * (1.0 + size * 2.0 * unit) + rounding;
    Assignment { columns: state.column_of.clone(), objective, gap }
}
