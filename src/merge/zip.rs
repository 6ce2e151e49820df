//! Greedy pairing: the two most similar units become one, until few enough are left.

use ndarray::Array2;

use crate::error::{ErrorKind, Result};

/// Units that are still apart, how alike they are, and for each the one most like it.
///
/// Keeping each row's best makes a step cost `O(n)`, plus `O(n)` for every row whose best was one
/// of the two that became one; searching the whole table at every step would cost `O(n²)`.
struct Zipper<J> {
    score: Array2<f32>,
    weight: Vec<f64>,
    /// Units that are left, ascending.
    alive: Vec<usize>,
    best: Vec<Option<usize>>,
    join: J,
}

/// Pairs units by `score: (n, n)` until `keep` are left: `(i, j)` with `i < j` for every step, in
/// order; unit `j` disappears into unit `i`.
///
/// The score of the new unit with unit `k` is `join(score_ik, score_jk, weight_i, weight_j)`, and
/// its weight the sum. Only the upper triangle of `score` is read. Ties go to the smallest `i`,
/// then `j`.
pub(super) fn greedy<J: Fn(f32, f32, f64, f64) -> f32>(
    mut score: Array2<f32>,
    weight: &[f64],
    keep: usize,
    join: J,
) -> Result<Vec<(usize, usize)>> {
    let n = weight.len();
    for i in 0..n {
        for j in 0..i {
            score[[i, j]] = score[[j, i]];
        }
    }
    let (alive, best) = ((0..n).collect(), vec![None; n]);
    let mut zipper = Zipper { score, weight: weight.to_vec(), alive, best, join };
    for i in 0..n {
        zipper.best[i] = zipper.most_alike(i);
    }
    let mut pairs = Vec::with_capacity(n.saturating_sub(keep));
    while zipper.alive.len() > keep.max(1) {
        pairs.push(zipper.step()?);
    }
    Ok(pairs)
}

impl<J: Fn(f32, f32, f64, f64) -> f32> Zipper<J> {
    fn most_alike(&self, i: usize) -> Option<usize> {
        let row = self.score.row(i);
        let mut best = None;
        let mut most = f32::NEG_INFINITY;
        for &j in &self.alive {
            // The first of equals stays; −∞ and NaN never win.
            if j != i && row[j] > most {
                (best, most) = (Some(j), row[j]);
            }
        }
        best
    }

    fn step(&mut self) -> Result<(usize, usize)> {
        let mut pair = None;
        let mut most = f32::NEG_INFINITY;
        for &i in &self.alive {
            if let Some(j) = self.best[i]
                && self.score[[i, j]] > most
            {
                (pair, most) = (Some((i.min(j), i.max(j))), self.score[[i, j]]);
            }
        }
        let Some((i, j)) = pair else {
            let reason = "the scores of the hidden units are not finite".into();
            return Err(ErrorKind::Numerical { operation: "zip", reason }.into());
        };
        self.unite(i, j);
        Ok((i, j))
    }

    fn unite(&mut self, i: usize, j: usize) {
        self.alive.retain(|&k| k != j);
        let (wi, wj) = (self.weight[i], self.weight[j]);
        for &k in &self.alive {
            if k != i {
                let joined = (self.join)(self.score[[i, k]], self.score[[j, k]], wi, wj);
                (self.score[[i, k]], self.score[[k, i]]) = (joined, joined);
            }
        }
        self.weight[i] += wj;
        for at in 0..self.alive.len() {
            let k = self.alive[at];
            match self.best[k] {
                Some(b) if k != i && b != i && b != j => {
                    let (new, old) = (self.score[[k, i]], self.score[[k, b]]);
                    if new > old || (new == old && i < b) {
                        self.best[k] = Some(i);
                    }
                }
                _ => self.best[k] = self.most_alike(k),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: search everything at every step.
    fn naive(mut score: Array2<f32>, keep: usize) -> Vec<(usize, usize)> {
        let n = score.nrows();
        let mut alive: Vec<usize> = (0..n).collect();
        let mut pairs = Vec::new();
        while alive.len() > keep {
            let mut best = (f32::NEG_INFINITY, 0, 0);
            for &i in &alive {
                for &j in alive.iter().filter(|&&j| j > i) {
                    if score[[i, j]] > best.0 {
                        best = (score[[i, j]], i, j);
                    }
                }
            }
            let (_, i, j) = best;
            for &k in &alive {
                let joined = 0.5 * score[[i, k]].min(score[[j, k]]);
                (score[[i, k]], score[[k, i]]) = (joined, joined);
            }
            alive.retain(|&k| k != j);
            pairs.push((i, j));
        }
        pairs
    }

    #[test]
    fn the_cache_finds_what_a_full_search_finds_ties_included() {
        for seed in 0..40 {
            let n = 3 + seed % 23;
            // Few distinct values: ties everywhere.
            let value = |(i, j): (usize, usize)| {
                let (a, b) = (i.min(j), i.max(j));
                ((a * 31 + b * 17 + seed * 7) % 11) as f32 / 4.0 - 1.0
            };
            let score = Array2::from_shape_fn((n, n), value);
            let join = |a: f32, b: f32, _, _| 0.5 * a.min(b);
            let found = greedy(score.clone(), &vec![1.0; n], n / 3, join).unwrap();
            assert_eq!(found, naive(score, (n / 3).max(1)), "seed {seed}");
        }
    }

    #[test]
    fn scores_that_are_not_finite_are_an_error() {
        let score = Array2::from_elem((2, 2), f32::NAN);
        assert!(greedy(score, &[1.0, 1.0], 1, |a, _, _, _| a).is_err());
    }
}
