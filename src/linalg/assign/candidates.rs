//! Short lists of the best columns of each row, with a bound on everything that is not listed.
//!
//! Prices only ever rise, so reduced gains only ever fall: the bound that held when a list was
//! made holds for the rest of the solve. A row is scanned again only when its list cannot answer.

use pulp::Arch;

use super::scan::{self, Scored, Sieve};
use crate::error::Result;

/// Columns kept for each row. From 12 to 48 measured alike; fewer are quicker to read.
const LISTED: usize = 16;

/// The gains and, for each row, its candidates.
pub(super) struct Candidates<'a> {
    arch: Arch,
    gain: &'a [f32],
    pub(super) n: usize,
    /// The largest magnitude of a gain.
    pub(super) largest: f64,
    width: usize,
    columns: Vec<u32>,
    gains: Vec<f32>,
    /// `bound[i] ≥ gain[i, j] − price[j]` for every column `j` that row `i` does not list.
    bound: Vec<f64>,
    sieve: Sieve,
}

/// What a list says about its row.
#[derive(Clone, Copy)]
pub(super) struct Best {
    pub(super) column: usize,
    pub(super) gain: f64,
    /// The gain less the price.
    pub(super) value: f64,
    /// At least the value of every other column.
    pub(super) second: f64,
}

impl<'a> Candidates<'a> {
    /// Scans every row once. A gain that is not finite is an error.
    pub(super) fn new(arch: Arch, gain: &'a [f32], n: usize, price: &[f64]) -> Result<Self> {
        let width = LISTED.min(n);
        let (columns, gains) = (vec![0; n * width], vec![0.0; n * width]);
        let (bound, sieve) = (vec![0.0; n], Sieve::new(arch, n));
        let mut new = Self { arch, gain, n, largest: 0.0, width, columns, gains, bound, sieve };
        for i in 0..n {
            // Row by row, so that the row is still in the cache when it is sifted.
            let row = new.row(i);
            let largest = f32::from_bits(scan::largest_magnitude(arch, row));
            if !largest.is_finite() {
                let j = row.iter().position(|g| !g.is_finite()).unwrap_or(0);
                return Err(super::not_finite(row[j], i * n + j));
            }
            new.largest = new.largest.max(largest.into());
            new.sift(i, price, f64::NEG_INFINITY);
        }
        Ok(new)
    }

    pub(super) fn row(&self, i: usize) -> &'a [f32] {
        &self.gain[i * self.n..][..self.n]
    }

    /// At least the value of every column that row `i` does not list.
    pub(super) fn bound(&self, i: usize) -> f64 {
        self.bound[i]
    }

    /// The listed columns and gains of row `i`.
    pub(super) fn list(&self, i: usize) -> impl Iterator<Item = (usize, f64)> + use<'_, 'a> {
        let range = i * self.width..(i + 1) * self.width;
        let columns = self.columns[range.clone()].iter().map(|&j| j as usize);
        columns.zip(self.gains[range].iter().map(|&g| f64::from(g)))
    }

    /// Makes the list of row `i` anew at the current prices.
    pub(super) fn rebuild(&mut self, i: usize, price: &[f64]) {
        let floor = self.list(i).map(|(j, g)| g - price[j]).fold(f64::INFINITY, f64::min);
        self.sift(i, price, floor);
    }

    fn sift(&mut self, i: usize, price: &[f64], floor: f64) {
        let row = self.row(i);
        self.bound[i] = self.sieve.top(row, price, self.width, floor, i);
        let range = i * self.width..(i + 1) * self.width;
        let slots = self.columns[range.clone()].iter_mut().zip(&mut self.gains[range]);
        for ((column, gain), &(_, j)) in slots.zip(&self.sieve.top) {
            (*column, *gain) = (j, row[j as usize]);
        }
    }

    /// Collects the columns `j` with `base − value < min(nearest, distance[j])` and their values.
    pub(super) fn nearer(
        &self,
        i: usize,
        price: &[f64],
        base: f64,
        nearest: f64,
        distance: &[f64],
        found: &mut Vec<Scored>,
    ) {
        scan::nearer(self.arch, self.row(i), price, base, nearest, distance, found);
    }

    /// The best column of row `i`, up to `slack` in its value.
    pub(super) fn best(&mut self, i: usize, price: &[f64], slack: f64) -> Best {
        let best = self.listed_best(i, price);
        if best.value >= self.bound[i] - slack {
            return best;
        }
        self.rebuild(i, price);
        self.listed_best(i, price)
    }

    /// At least `max_j gain[i, j] − price[j]`, without looking at the dense row.
    pub(super) fn at_most(&self, i: usize, price: &[f64]) -> f64 {
        self.list(i).map(|(j, g)| g - price[j]).fold(self.bound[i], f64::max)
    }

    /// The dual bound `Σ_j price_j + Σ_i max_j (gain[i, j] − price_j)` on every assignment.
    pub(super) fn upper_bound(&self, price: &[f64]) -> f64 {
        let rows: f64 = (0..self.n).map(|i| self.at_most(i, price)).sum();
        rows + price.iter().sum::<f64>()
    }

    fn listed_best(&self, i: usize, price: &[f64]) -> Best {
        let (value, second) = (f64::NEG_INFINITY, self.bound[i]);
        let mut best = Best { column: 0, gain: 0.0, value, second };
        for (column, gain) in self.list(i) {
            let value = gain - price[column];
            if value > best.value {
                best = Best { column, gain, value, second: best.second.max(best.value) };
            } else if value > best.second {
                best.second = value;
            }
        }
        best
    }
}
