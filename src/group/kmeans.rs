//! K-means clustering from distances alone.

use ndarray::Array2;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::clusters::{Representative, grouping};
use super::quota::{Quota, Rest, Spread, free};
use crate::error::{Locate, Result};
use crate::model::{Budget, Grouping, LayerId};
use crate::par;
use crate::stage::{Context, Grouper, LayerSummary, Stage};

/// No run takes more rounds; most stop after fewer than ten.
const ROUNDS: usize = 100;

/// K-means (Lloyd) on the layer's distances, with k-means++ seeds and restarts (HC-SMoE's other
/// clustering).
///
/// The distance of expert `i` to the centroid `μ_c` of a cluster follows from pairwise distances
/// alone: `‖x_i − μ_c‖² = mean_{j∈c} d²(i,j) − ½ mean_{j,k∈c} d²(j,k)`, exactly for Euclidean
/// tables; other tables are treated alike, and the best partition seen is returned, because the
/// loss then need not fall in every round. Loss: `Σ_c Σ_{i∈c} ‖x_i − μ_c‖²`. Every layer draws
/// from its own stream of the context's seed. Cost: `O(n²)` per round, at most 100 rounds per
/// restart.
///
/// *Deviations.* HC-SMoE standardises the distances to the centroids per cluster; here they are
/// compared as they are. A cluster that runs empty takes the expert farthest from its own centroid.
/// Under a group capacity the closest (expert, centroid) pairs are matched first. A total is spread
/// evenly over the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KMeans {
    /// Number of runs, of which the best counts; at least one is made.
    pub restarts: usize,
    /// Which member is the dominant expert.
    pub representative: Representative,
}

impl Default for KMeans {
    fn default() -> Self {
        Self { restarts: 10, representative: Representative::MostUsed }
    }
}

impl Stage for KMeans {
    fn name(&self) -> &str {
        "k-means"
    }
}

impl Grouper for KMeans {
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Grouping>> {
        let quota = Quota::new(layers, budget, Spread::Uniform, Rest::Joins)?;
        par::map(layers.len(), |l| {
            let layer = &layers[l];
            let experts = free(layer, budget);
            let k = quota.least[l] - budget.protected_in(layer.id);
            let points = Points::new(layer, &experts, k, budget.group_capacity);
            let mut clusters = vec![Vec::new(); k];
            if k > 0 {
                let best = points.best_of(self.restarts, &mut layer.id.random_numbers(cx.seed()));
                best.label.iter().zip(&experts).for_each(|(&c, &i)| clusters[c].push(i));
            }
            grouping(layer, budget, clusters, self.representative).in_layer(layer.id)
        })
    }

    fn counts(&self, layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>> {
        Quota::known(layers, budget, Spread::Uniform, Rest::Joins)
    }
}

/// A partition and its loss, as one value: the labels always belong to the loss.
struct Partition {
    label: Vec<usize>,
    loss: f64,
}

/// `n` points known by their squared distances `(n, n)`, to be parted into `k ≤ n` clusters.
struct Points {
    squared: Array2<f64>,
    k: usize,
    capacity: Option<usize>,
}

impl Points {
    fn new(layer: &LayerSummary, experts: &[usize], k: usize, capacity: Option<usize>) -> Self {
        let (n, distance) = (experts.len(), layer.similarity.distances());
        let square = |(i, j): (usize, usize)| distance[[experts[i], experts[j]]].powi(2);
        Self { squared: Array2::from_shape_fn((n, n), square), k, capacity }
    }

    fn len(&self) -> usize {
        self.squared.nrows()
    }

    /// The best of several runs; the earlier wins ties.
    fn best_of(&self, restarts: usize, rng: &mut ChaCha8Rng) -> Partition {
        let first = self.run(rng);
        (1..restarts).fold(first, |best, _| {
            let next = self.run(rng);
            if next.loss < best.loss { next } else { best }
        })
    }

    /// One run of Lloyd's algorithm: the best partition it saw.
    fn run(&self, rng: &mut ChaCha8Rng) -> Partition {
        let seeds = self.seeds(rng);
        let to_seed = |(i, c): (usize, usize)| self.squared[[i, seeds[c]]];
        let mut label = self.assign(&Array2::from_shape_fn((self.len(), self.k), to_seed));
        let mut best = Partition { loss: self.loss(&label), label: label.clone() };
        for _ in 0..ROUNDS {
            let next = self.assign(&self.to_centroids(&label));
            if next == label {
                break;
            }
            label = next;
            let loss = self.loss(&label);
            if loss < best.loss {
                best = Partition { label: label.clone(), loss };
            }
        }
        best
    }

    /// k-means++: the first seed uniform, every other with probability proportional to the squared
    /// distance to the nearest seed so far. Where nothing but copies of seeds is left, the first of
    /// them.
    fn seeds(&self, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let n = self.len();
        let mut seeds = vec![rng.random_range(0..n)];
        let mut nearest = self.squared.row(seeds[0]).to_vec();
        while seeds.len() < self.k {
            let total: f64 = nearest.iter().sum();
            let mut left = rng.random::<f64>() * total;
            let drawn = (0..n).filter(|&i| nearest[i] > 0.0).find(|&i| {
                left -= nearest[i];
                left < 0.0
            });
            // Rounding may leave a sliver of the range behind the last candidate.
            let last = (0..n).rev().find(|&i| nearest[i] > 0.0);
            let copy = (0..n).find(|i| !seeds.contains(i));
            let Some(seed) = drawn.or(last).or(copy) else { break };
            seeds.push(seed);
            for (near, d) in nearest.iter_mut().zip(self.squared.row(seed)) {
                *near = near.min(*d);
            }
            nearest[seed] = 0.0;
        }
        seeds
    }

    /// `(n, k)` squared distances to the centroids.
    fn to_centroids(&self, label: &[usize]) -> Array2<f64> {
        let (mut sum, mut size) = (Array2::zeros((self.len(), self.k)), vec![0.0; self.k]);
        for (j, &c) in label.iter().enumerate() {
            size[c] += 1.0;
            let mut column = sum.column_mut(c);
            column += &self.squared.row(j);
        }
        for c in 0..self.k {
            let inner: f64 = (0..self.len()).filter(|&j| label[j] == c).map(|j| sum[[j, c]]).sum();
            let half = inner / (2.0 * size[c] * size[c]);
            sum.column_mut(c).mapv_inplace(|s| s / size[c] - half);
        }
        sum
    }

    /// `Σ_c 1/(2|c|) Σ_{i,j∈c} d²(i,j)`.
    fn loss(&self, label: &[usize]) -> f64 {
        let cluster = |c: usize| {
            let members: Vec<usize> = (0..self.len()).filter(|&i| label[i] == c).collect();
            let row = |&i: &usize| members.iter().map(|&j| self.squared[[i, j]]).sum::<f64>();
            members.iter().map(row).sum::<f64>() / (2.0 * members.len() as f64)
        };
        (0..self.k).map(cluster).sum()
    }

    /// The cheapest cluster of every point, within the capacity and with no cluster empty.
    fn assign(&self, cost: &Array2<f64>) -> Vec<usize> {
        let mut label = match self.capacity {
            None => cost.rows().into_iter().map(|row| first_min(row.iter().copied())).collect(),
            Some(capacity) => self.assign_within(cost, capacity),
        };
        self.fill_empty(cost, &mut label);
        label
    }

    /// Matches the cheapest (point, cluster) pairs first. `k · capacity ≥ n` leaves room for all.
    fn assign_within(&self, cost: &Array2<f64>, capacity: usize) -> Vec<usize> {
        let mut pairs: Vec<((usize, usize), f64)> =
            cost.indexed_iter().map(|(at, &x)| (at, x)).collect();
        pairs.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        let (mut label, mut size) = (vec![None; self.len()], vec![0; self.k]);
        for ((i, c), _) in pairs {
            if label[i].is_none() && size[c] < capacity {
                label[i] = Some(c);
                size[c] += 1;
            }
        }
        label.into_iter().map(|c| c.unwrap_or(0)).collect()
    }

    fn fill_empty(&self, cost: &Array2<f64>, label: &mut [usize]) {
        let mut size = vec![0; self.k];
        label.iter().for_each(|&c| size[c] += 1);
        for empty in 0..self.k {
            if size[empty] > 0 {
                continue;
            }
            let spare = (0..self.len()).filter(|&i| size[label[i]] > 1);
            let farther = |a: usize, b: usize| {
                if cost[[b, label[b]]] > cost[[a, label[a]]] { b } else { a }
            };
            if let Some(i) = spare.reduce(farther) {
                size[label[i]] -= 1;
                label[i] = empty;
                size[empty] = 1;
            }
        }
    }
}

/// Position of the first minimum.
fn first_min(values: impl Iterator<Item = f64>) -> usize {
    let least = values.enumerate().reduce(|best, next| if next.1 < best.1 { next } else { best });
    least.map_or(0, |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn points(at: &[f64], k: usize) -> Points {
        let n = at.len();
        let squared = Array2::from_shape_fn((n, n), |(i, j)| (at[i] - at[j]).powi(2));
        Points { squared, k, capacity: None }
    }

    #[test]
    fn centroid_distances_and_loss_need_no_coordinates() {
        let points = points(&[0.0, 2.0, 10.0], 2);
        let cost = points.to_centroids(&[0, 0, 1]);
        assert_eq!(cost, ndarray::array![[1.0, 100.0], [1.0, 64.0], [81.0, 0.0]]);
        assert_eq!(points.loss(&[0, 0, 1]), 2.0);
    }

    #[test]
    fn separated_clusters_are_found() {
        let points = points(&[0.0, 50.0, 1.0, 100.0, 51.0, 99.0], 3);
        let best = points.best_of(5, &mut ChaCha8Rng::seed_from_u64(0));
        assert_eq!(best.loss, 1.5);
        assert!([(0, 2), (1, 4), (3, 5)].iter().all(|&(a, b)| best.label[a] == best.label[b]));
    }

    #[test]
    fn copies_of_one_point_fill_every_cluster() {
        let points = points(&[1.0; 5], 4);
        let mut label = points.run(&mut ChaCha8Rng::seed_from_u64(1)).label;
        label.sort_unstable();
        label.dedup();
        assert_eq!(label, [0, 1, 2, 3]);
    }
}
