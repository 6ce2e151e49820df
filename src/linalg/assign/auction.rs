//! The auction: unassigned rows bid for columns, and prices rise until no row gains by a change.
//!
//! D. P. Bertsekas, *The auction algorithm*, Annals of Operations Research 14 (1988).

use std::collections::VecDeque;

use super::candidates::Candidates;

/// No partner.
pub(super) const NONE: u32 = u32::MAX;

/// Prices and a partial matching.
pub(super) struct State {
    pub(super) price: Vec<f64>,
    pub(super) column_of: Vec<u32>,
    /// The gain of each matched row: a look-up in the matrix would be a cache miss.
    pub(super) gain_of: Vec<f64>,
    pub(super) row_of: Vec<u32>,
}

impl State {
    pub(super) fn new(price: Vec<f64>) -> Self {
        let n = price.len();
        Self { price, column_of: vec![NONE; n], gain_of: vec![0.0; n], row_of: vec![NONE; n] }
    }

    pub(super) fn is_free(&self, i: usize) -> bool {
        self.column_of[i] == NONE
    }

    /// What its column is worth to the matched row `i`.
    pub(super) fn value(&self, i: usize) -> f64 {
        self.gain_of[i] - self.price[self.column_of[i] as usize]
    }

    /// Gives column `j` to the free row `i` and returns the row that loses it, or [`NONE`].
    fn give(&mut self, i: usize, j: usize, gain: f64) -> u32 {
        let loser = std::mem::replace(&mut self.row_of[j], i as u32);
        if loser != NONE {
            self.column_of[loser as usize] = NONE;
        }
        (self.column_of[i], self.gain_of[i]) = (j as u32, gain);
        loser
    }

    /// Frees every row whose column is worse than its best by more than `epsilon`; returns how
    /// many rows are free.
    pub(super) fn release(&mut self, rows: &mut Candidates<'_>, epsilon: f64) -> usize {
        let mut free = 0;
        for i in 0..self.column_of.len() {
            let kept = self.is_free(i)
                || self.value(i) >= rows.at_most(i, &self.price) - epsilon
                || self.value(i) >= rows.best(i, &self.price, 0.0).value - epsilon;
            if !kept {
                self.row_of[self.column_of[i] as usize] = NONE;
                self.column_of[i] = NONE;
            }
            free += usize::from(self.is_free(i));
        }
        free
    }
}

/// Free rows bid until all have a column within `epsilon` of their best, or `limit` bids are made.
///
/// A bid raises the price of the best column until it is worth `epsilon` less than the second
/// best. With `epsilon = 0` a row that cannot raise the price of a taken column stays free.
/// Returns whether every row has a column.
pub(super) fn phase(
    rows: &mut Candidates<'_>,
    state: &mut State,
    epsilon: f64,
    limit: usize,
) -> bool {
    let mut queue: VecDeque<u32> =
        (0..rows.n).filter(|&i| state.is_free(i)).map(|i| i as u32).collect();
    for _ in 0..limit {
        let Some(i) = queue.pop_front() else { break };
        let i = i as usize;
        // A listed column within ε/2 of the bound will do: the raise below is then at least ε/2,
        // and leaves the column within ε of anything unlisted.
        let best = rows.best(i, &state.price, epsilon / 2.0);
        let raise = best.value - best.second + epsilon;
        if raise <= 0.0 && state.row_of[best.column] != NONE {
            continue;
        }
        // A matrix of one column has no second best, and needs no price.
        state.price[best.column] += if raise.is_finite() { raise.max(0.0) } else { 0.0 };
        let loser = state.give(i, best.column, best.gain);
        if loser != NONE {
            queue.push_back(loser);
        }
    }
    state.row_of.iter().all(|&i| i != NONE)
}
