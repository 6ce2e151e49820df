//! The tokens that are routed to each expert of a merged layer.

use ndarray::{Array2, ArrayView1, ArrayView2};

use super::layer::MergedLayer;
use super::router::{Router, Routing};
use crate::error::Result;
use crate::linalg::Compute;

impl MergedLayer {
    /// The router that chooses and, for each of its rows, the merged expert behind it (`None`:
    /// dropped): the narrowed router if asked for and there, else the `n`-row one and the map.
    pub fn choosing(&self, narrowed: bool) -> (&Router, Vec<Option<usize>>) {
        match self.narrowed.as_ref().filter(|_| narrowed) {
            Some(router) => (router, (0..self.experts.len()).map(Some).collect()),
            None => (&self.router, self.grouping.labels().to_vec()),
        }
    }

    /// For each merged expert the rows of `X: (t, d_model)` that visit it, ascending, and their
    /// weights. Weights of members that fire together add up; dropped experts are not chosen.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn visits(
        &self,
        narrowed: bool,
        x: ArrayView2<'_, f32>,
        compute: &dyn Compute,
    ) -> Result<Vec<Vec<(usize, f32)>>> {
        let (router, map) = self.choosing(narrowed);
        let mut logits = router.logits(x, compute)?;
        close_dropped(&mut logits, &map);
        let routing = router.route(logits.view())?;
        Ok(routing.visits(&map, self.experts.len()))
    }
}

/// Sets the logits of rows that lead to no expert to `−∞`, before the softmax: their mass goes to
/// the experts that remain.
pub fn close_dropped(logits: &mut Array2<f32>, map: &[Option<usize>]) {
    for (mut column, _) in logits.columns_mut().into_iter().zip(map).filter(|(_, e)| e.is_none()) {
        column.fill(f32::NEG_INFINITY);
    }
}

impl Routing {
    /// For each of `m` merged experts the tokens that visit it, ascending, and their weights;
    /// `map[i]` is the merged expert behind row `i` of the router. Weights of rows that lead to the
    /// same expert add up.
    pub fn visits(&self, map: &[Option<usize>], m: usize) -> Vec<Vec<(usize, f32)>> {
        self.visits_where(map, m, |_, _| true)
    }

    /// [`Routing::visits`] without the slots `(token, slot)` for which there is no room.
    pub fn visits_where(
        &self,
        map: &[Option<usize>],
        m: usize,
        room: impl Fn(usize, usize) -> bool,
    ) -> Vec<Vec<(usize, f32)>> {
        let mut visits: Vec<Vec<(usize, f32)>> = vec![Vec::new(); m];
        let rows = self.experts.rows().into_iter().zip(self.weights.rows()).enumerate();
        for (t, (chosen, weights)) in rows {
            for (slot, (&row, &w)) in chosen.iter().zip(weights).enumerate() {
                let Some(expert) = map.get(row as usize).copied().flatten() else { continue };
                let Some(visits) = visits.get_mut(expert).filter(|_| room(t, slot)) else {
                    continue;
                };
                match visits.last_mut() {
                    Some((last, sum)) if *last == t => *sum += w,
                    _ => visits.push((t, w)),
                }
            }
        }
        visits
    }
}

/// What an expert gave to the tokens that visit it, before the router's weights.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutputSums {
    /// `‖E(x)‖₂` of every visit, in the order of the visits.
    pub norms: Vec<f64>,
    /// `(d_model)` `Σ E(x)`; empty without visits.
    pub sum: Vec<f64>,
}

/// `‖y‖₂`.
fn norm(y: ArrayView1<'_, f32>) -> f64 {
    y.iter().map(|&y| f64::from(y) * f64::from(y)).sum::<f64>().sqrt()
}

impl OutputSums {
    /// Of one block: its outputs `(t, d_model)`, which hold their weights as factors. Visits of
    /// weights below `least` are left for [`OutputSums::put`].
    pub fn of(outputs: ArrayView2<'_, f32>, weights: &[f32], least: f32) -> Self {
        let mut sums = Self { norms: Vec::new(), sum: vec![0.0; outputs.ncols()] };
        for (y, &w) in outputs.rows().into_iter().zip(weights) {
            let scale = if w < least { 0.0 } else { f64::from(w).recip() };
            sums.norms.push(norm(y) * scale);
            sums.sum.iter_mut().zip(y).for_each(|(sum, &y)| *sum += scale * f64::from(y));
        }
        sums
    }

    /// Puts the outputs before the weights of some visits of the block.
    pub fn put(&mut self, visits: &[usize], outputs: ArrayView2<'_, f32>) {
        for (&i, y) in visits.iter().zip(outputs.rows()) {
            if let Some(known) = self.norms.get_mut(i) {
                *known = norm(y);
            }
            self.sum.iter_mut().zip(y).for_each(|(sum, &y)| *sum += f64::from(y));
        }
    }

    /// Appends the block that follows.
    pub fn append(&mut self, next: Self) {
        self.norms.extend(next.norms);
        if self.sum.is_empty() {
            self.sum = next.sum;
        } else {
            self.sum.iter_mut().zip(next.sum).for_each(|(sum, y)| *sum += y);
        }
    }
}

/// Positions in two ascending lists of what they have in common.
pub(crate) fn common(a: &[usize], b: &[usize]) -> Vec<(usize, usize)> {
    let (mut i, mut j, mut found) = (0, 0, Vec::new());
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                found.push((i, j));
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn weights_of_rows_behind_one_expert_add_up() {
        let routing = Routing {
            experts: array![[0, 2], [1, 2], [3, 0]],
            weights: array![[0.5, 0.25], [0.5, 0.125], [1.0, 2.0]],
        };
        let visits = routing.visits(&[Some(1), Some(0), Some(1), None], 2);
        assert_eq!(visits[0], [(1, 0.5)]);
        assert_eq!(visits[1], [(0, 0.75), (1, 0.125), (2, 2.0)]);
    }

    #[test]
    fn common_entries_of_ascending_lists() {
        assert_eq!(common(&[1, 3, 4, 9], &[0, 3, 9]), [(1, 1), (3, 2)]);
        assert!(common(&[1], &[]).is_empty());
    }
}
