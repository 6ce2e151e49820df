//! Shortest augmenting paths: the exact last step of the assignment.
//!
//! R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear
//! assignment problems", Computing 38 (1987). Ours searches the candidate lists, and returns to a
//! dense row only when the bound on its unlisted columns becomes the nearest thing in the queue.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::auction::{NONE, State};
use super::candidates::Candidates;
use super::scan::Scored;

/// A search tree over columns, reused from one search to the next.
pub(super) struct Search {
    distance: Vec<f64>,
    /// The row from which a column was reached.
    parent: Vec<u32>,
    settled: Vec<bool>,
    touched: Vec<u32>,
    scanned: Vec<u32>,
    /// Rows in the tree whose list was made anew.
    renewed: Vec<bool>,
    nearer: Vec<Scored>,
    rows: Vec<u32>,
    /// What the reduced gain of a row must be subtracted from to give a distance.
    base: Vec<f64>,
    /// Distance bits (never negative nor −0, so their order is that of the numbers), then `column`
    /// or `n + row` for the unlisted columns of a row.
    queue: BinaryHeap<Reverse<(u64, u32)>>,
    nearest: f64,
    target: u32,
}

impl Search {
    pub(super) fn new(n: usize) -> Self {
        Self {
            distance: vec![f64::INFINITY; n],
            parent: vec![NONE; n],
            settled: vec![false; n],
            touched: Vec::new(),
            scanned: Vec::new(),
            renewed: vec![false; n],
            nearer: Vec::new(),
            rows: Vec::new(),
            base: vec![0.0; n],
            queue: BinaryHeap::new(),
            nearest: f64::INFINITY,
            target: NONE,
        }
    }

    /// Matches the free row `free`: one shortest path, then the price rises that keep it optimal.
    pub(super) fn augment(&mut self, rows: &mut Candidates<'_>, state: &mut State, free: usize) {
        let n = rows.n;
        let best = rows.best(free, &state.price, 0.0);
        self.enter(rows, state, free, best.value, 0.0);
        while let Some(Reverse((bits, item))) = self.queue.pop() {
            let at = f64::from_bits(bits);
            if at >= self.nearest {
                break;
            }
            let item = item as usize;
            if item >= n {
                self.expand(rows, state, item - n, at);
            } else if !self.settled[item] && at == self.distance[item] {
                self.settled[item] = true;
                self.scanned.push(item as u32);
                let next = state.row_of[item] as usize;
                self.enter(rows, state, next, state.value(next), at);
            }
        }
        self.raise(state);
        self.flip(rows, state, free);
        self.clear();
    }

    /// Adds a row at distance `at` whose own column is worth `value`.
    fn enter(&mut self, rows: &Candidates<'_>, state: &State, i: usize, value: f64, at: f64) {
        self.base[i] = at + value;
        self.rows.push(i as u32);
        for (j, g) in rows.list(i) {
            self.relax(state, i, j, g - state.price[j], at);
        }
        self.defer(rows.n, i, rows.bound(i), at);
    }

    /// Queues the unlisted columns of row `i`, none of which is worth more than `bound`.
    fn defer(&mut self, n: usize, i: usize, bound: f64, at: f64) {
        let key = (self.base[i] - bound).max(at);
        if key < self.nearest && bound > f64::NEG_INFINITY {
            self.queue.push(Reverse((key.to_bits(), (n + i) as u32)));
        }
    }

    /// Reaches column `j` from row `i`, if that is nearer. A free column ends the search, so only
    /// the nearest is kept, and nothing beyond it is queued.
    fn relax(&mut self, state: &State, i: usize, j: usize, value: f64, at: f64) {
        let distance = (self.base[i] - value).max(at);
        if distance >= self.nearest || distance >= self.distance[j] || self.settled[j] {
            return;
        }
        if self.distance[j] == f64::INFINITY {
            self.touched.push(j as u32);
        }
        self.distance[j] = distance;
        self.parent[j] = i as u32;
        if state.row_of[j] == NONE {
            (self.nearest, self.target) = (distance, j as u32);
        } else {
            self.queue.push(Reverse((distance.to_bits(), j as u32)));
        }
    }

    /// The unlisted columns of row `i` are next: first a new list, then the whole row.
    ///
    /// The new list is for the searches to come as well. Where it is no help, many columns are
    /// about as good as each other, and a longer list would only be read twice.
    fn expand(&mut self, rows: &mut Candidates<'_>, state: &State, i: usize, at: f64) {
        if !std::mem::replace(&mut self.renewed[i], true) {
            rows.rebuild(i, &state.price);
            for (j, g) in rows.list(i) {
                self.relax(state, i, j, g - state.price[j], at);
            }
            return self.defer(rows.n, i, rows.bound(i), at);
        }
        let mut nearer = std::mem::take(&mut self.nearer);
        let (base, nearest) = (self.base[i], self.nearest);
        rows.nearer(i, &state.price, base, nearest, &self.distance, &mut nearer);
        for &(value, j) in &nearer {
            self.relax(state, i, j as usize, value, at);
        }
        self.nearer = nearer;
    }

    /// Raises the price of every column that is nearer than the target by how much nearer it is:
    /// the path becomes tight, and no row sees a better column than its own.
    fn raise(&mut self, state: &mut State) {
        for &j in &self.scanned {
            state.price[j as usize] += self.nearest - self.distance[j as usize];
        }
    }

    /// Moves every row on the path to the column it was reached by.
    fn flip(&self, rows: &Candidates<'_>, state: &mut State, free: usize) {
        let mut j = self.target;
        while j != NONE {
            let i = self.parent[j as usize] as usize;
            state.row_of[j as usize] = i as u32;
            state.gain_of[i] = f64::from(rows.row(i)[j as usize]);
            j = std::mem::replace(&mut state.column_of[i], j);
            if i == free {
                break;
            }
        }
    }

    fn clear(&mut self) {
        for j in self.touched.drain(..) {
            self.distance[j as usize] = f64::INFINITY;
            self.settled[j as usize] = false;
        }
        for i in self.rows.drain(..) {
            self.renewed[i as usize] = false;
        }
        self.scanned.clear();
        self.queue.clear();
        (self.nearest, self.target) = (f64::INFINITY, NONE);
    }
}
