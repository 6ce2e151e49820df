//! Agglomerative clustering of one layer, from its distance table.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

/// The distance `d(A, B)` of two clusters, kept up to date by the Lance–Williams formula when `i`
/// and `j` become one, for every other cluster `k`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Linkage {
    /// UPGMA, the mean over pairs: `(n_i d_ik + n_j d_jk) / (n_i + n_j)`.
    #[default]
    Average,
    /// The closest pair: `min(d_ik, d_jk)`.
    Single,
    /// The farthest pair: `max(d_ik, d_jk)`.
    Complete,
    /// The growth of the within-cluster variance, for Euclidean distances:
    /// `√(((n_i + n_k) d_ik² + (n_j + n_k) d_jk² − n_k d_ij²) / (n_i + n_j + n_k))`.
    Ward,
}

impl Linkage {
    /// `d(i ∪ j, k)` from the distances and sizes of `i`, `j` and `k`.
    fn update(self, (ik, jk, ij): (f64, f64, f64), (ni, nj, nk): (usize, usize, usize)) -> f64 {
        let [i, j, k] = [ni, nj, nk].map(|n| n as f64);
        match self {
            Self::Average => (i * ik + j * jk) / (i + j),
            Self::Single => ik.min(jk),
            Self::Complete => ik.max(jk),
            Self::Ward => {
                let squared = (i + k) * ik * ik + (j + k) * jk * jk - k * ij * ij;
                // Negative only for tables that no points in space have.
                (squared / (i + j + k)).max(0.0).sqrt()
            }
        }
    }
}

/// Two clusters that became one, named by their smallest members.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Merge {
    pub(super) kept: usize,
    pub(super) gone: usize,
    /// Their distance. Never smaller than that of the merge before, but for rounding: the linkages
    /// are reducible, and what is too large to merge stays too large.
    pub(super) height: f64,
}

/// All merges of a set of experts, cheapest first.
#[derive(Debug)]
pub(super) struct Dendrogram<'a> {
    distance: ArrayView2<'a, f64>,
    experts: Vec<usize>,
    capacity: usize,
    merges: Vec<Merge>,
}

impl<'a> Dendrogram<'a> {
    /// Merges the closest two clusters that fit into `capacity` until none do. Ties: the smaller
    /// `kept`, then the smaller `gone`. `experts` ascend.
    ///
    /// `O(n³)` time, of which the search for the minimum is all; `O(n²)` memory.
    pub(super) fn new(
        distance: ArrayView2<'a, f64>,
        experts: Vec<usize>,
        linkage: Linkage,
        capacity: usize,
    ) -> Self {
        let n = experts.len();
        let mut d = Array2::from_shape_fn((n, n), |(i, j)| distance[[experts[i], experts[j]]]);
        let mut size = vec![1; n];
        let mut merges = Vec::with_capacity(n.saturating_sub(1));
        while let Some((i, j)) = closest(&d, &size, capacity) {
            let (ij, ni, nj) = (d[[i, j]], size[i], size[j]);
            for k in (0..n).filter(|&k| size[k] > 0 && k != i && k != j) {
                let new = linkage.update((d[[i, k]], d[[j, k]], ij), (ni, nj, size[k]));
                (d[[i, k]], d[[k, i]]) = (new, new);
            }
            (size[i], size[j]) = (ni + nj, 0);
            merges.push(Merge { kept: experts[i], gone: experts[j], height: ij });
        }
        Self { distance, experts, capacity, merges }
    }

    /// The merges, cheapest first.
    pub(super) fn merges(&self) -> &[Merge] {
        &self.merges
    }

    /// The partition into `groups` clusters.
    ///
    /// Under a capacity the merges may end early, e.g. at three pairs where two triples were
    /// wanted. Then the smallest cluster is dissolved and its members join the clusters that are
    /// nearest on average and have room, until few enough remain. Room is always left:
    /// `groups · capacity` is at least the number of experts.
    pub(super) fn cut(&self, groups: usize) -> Vec<Vec<usize>> {
        let mut clusters: Vec<Vec<usize>> = self.experts.iter().map(|&i| vec![i]).collect();
        for merge in self.merges.iter().take(clusters.len().saturating_sub(groups)) {
            let at = |i: usize| clusters.iter().position(|c| c.first() == Some(&i));
            if let (Some(kept), Some(gone)) = (at(merge.kept), at(merge.gone)) {
                let members = clusters.remove(gone);
                // `gone` begins with a larger expert and so lies behind `kept`.
                clusters[kept].extend(members);
            }
        }
        while clusters.len() > groups.max(1) {
            self.dissolve_smallest(&mut clusters);
        }
        clusters
    }

    fn dissolve_smallest(&self, clusters: &mut Vec<Vec<usize>>) {
        let Some(at) = (0..clusters.len()).min_by_key(|&c| clusters[c].len()) else { return };
        for i in clusters.remove(at) {
            let open = (0..clusters.len()).filter(|&c| clusters[c].len() < self.capacity);
            let mean = |c: usize| {
                let sum: f64 = clusters[c].iter().map(|&j| self.distance[[i, j]]).sum();
                sum / clusters[c].len() as f64
            };
            if let Some(c) = open.min_by(|&a, &b| mean(a).total_cmp(&mean(b))) {
                clusters[c].push(i);
            }
        }
    }
}

/// The closest two clusters of at most `capacity` members together; clusters of size 0 are gone.
fn closest(d: &Array2<f64>, size: &[usize], capacity: usize) -> Option<(usize, usize)> {
    let mut best: Option<(usize, usize)> = None;
    let mut least = f64::INFINITY;
    for i in (0..size.len()).filter(|&i| size[i] > 0) {
        for j in (i + 1..size.len()).filter(|&j| size[j] > 0 && size[i] + size[j] <= capacity) {
            if d[[i, j]] < least {
                (least, best) = (d[[i, j]], Some((i, j)));
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    /// Points on a line at 0, 1, 5, 7.
    fn line(linkage: Linkage, capacity: usize) -> Vec<(usize, usize, f64)> {
        let points = [0.0f64, 1.0, 5.0, 7.0];
        let table = Array2::from_shape_fn((4, 4), |(i, j)| (points[i] - points[j]).abs());
        let tree = Dendrogram::new(table.view(), vec![0, 1, 2, 3], linkage, capacity);
        tree.merges().iter().map(|m| (m.kept, m.gone, m.height)).collect()
    }

    #[test]
    fn heights_follow_the_formulas() {
        let last = |linkage| line(linkage, 4)[2];
        assert_eq!(line(Linkage::Average, 4)[..2], [(0, 1, 1.0), (2, 3, 2.0)]);
        assert_eq!(last(Linkage::Average), (0, 2, 5.5));
        assert_eq!(last(Linkage::Single), (0, 2, 4.0));
        assert_eq!(last(Linkage::Complete), (0, 2, 7.0));
        // √(2 n_i n_j/(n_i + n_j)) · ‖μ_i − μ_j‖ = √2 · 5.5
        let ward = last(Linkage::Ward).2;
        assert!((ward - 2f64.sqrt() * 5.5).abs() < 1e-12, "{ward}");
    }

    #[test]
    fn merges_beyond_the_capacity_are_skipped() {
        assert_eq!(line(Linkage::Average, 2).len(), 2);
        assert_eq!(line(Linkage::Average, 1).len(), 0);
    }

    #[test]
    fn three_pairs_become_two_triples() {
        let points = [0.0f64, 1.0, 10.0, 11.0, 20.0, 21.0];
        let table = Array2::from_shape_fn((6, 6), |(i, j)| (points[i] - points[j]).abs());
        let tree = Dendrogram::new(table.view(), (0..6).collect(), Linkage::Average, 3);
        assert_eq!(tree.merges().len(), 3);
        assert_eq!(tree.cut(3), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(tree.cut(2), [[2, 3, 0], [4, 5, 1]]);
    }

    #[test]
    fn an_empty_or_single_set_has_no_merges() {
        let table = array![[0.0, 1.0], [1.0, 0.0]];
        let of = |experts| Dendrogram::new(table.view(), experts, Linkage::Ward, 9).cut(1);
        assert_eq!(of(vec![]), Vec::<Vec<usize>>::new());
        assert_eq!(of(vec![1]), [[1]]);
    }
}
