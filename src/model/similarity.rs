//! The similarity table of the experts of a layer.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::check::check_finite_f64;
use crate::error::{Error, Result};

/// How two vectors are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Similarity `(cos + 1)/2`, distance `1 − cos`.
    Cosine,
    /// Distance `‖x − y‖₂`, similarity `1/(1 + distance)`.
    Euclidean,
    /// Distance `acos(cos)/π`, similarity `1 − distance`.
    Angular,
}

impl Measure {
    /// Similarity and distance of two vectors from their inner products `⟨x,x⟩`, `⟨y,y⟩`, `⟨x,y⟩`.
    ///
    /// Gram entries are all that any measure needs, which is what allows a streamed pass over the
    /// tokens. The cosine with a zero vector is 0, as in the paper's code (eps 1e-7).
    pub fn of_gram(self, xx: f64, yy: f64, xy: f64) -> (f64, f64) {
        let norm = (xx.max(0.0) * yy.max(0.0)).sqrt();
        let cos = if norm > 0.0 { (xy / norm).clamp(-1.0, 1.0) } else { 0.0 };
        match self {
            Self::Cosine => ((cos + 1.0) / 2.0, 1.0 - cos),
            Self::Angular => {
                let angle = cos.acos() / std::f64::consts::PI;
                (1.0 - angle, angle)
            }
            Self::Euclidean => {
                let distance = (xx + yy - 2.0 * xy).max(0.0).sqrt();
                (1.0 / (1.0 + distance), distance)
            }
        }
    }
}

/// A symmetric `(n, n)` table of similarities (larger is more alike) and of the distances that
/// linkage methods need. Both are finite; the diagonal of the distances is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct SimilarityMatrix {
    similarity: Array2<f64>,
    distance: Array2<f64>,
}

impl SimilarityMatrix {
    /// From similarities alone, e.g. a user's own metric: distance = largest similarity of the
    /// table (diagonal included) minus similarity, 0 on the diagonal.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when not square,
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite), and
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when not symmetric.
    pub fn from_similarities(similarity: Array2<f64>) -> Result<Self> {
        let largest = similarity.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut distance = similarity.mapv(|s| largest - s);
        distance.diag_mut().fill(0.0);
        Self::new(similarity, distance)
    }

    /// From distances alone: similarity = `1/(1 + distance)`.
    ///
    /// # Errors
    /// As [`SimilarityMatrix::from_similarities`]; also for a negative distance.
    pub fn from_distances(distance: Array2<f64>) -> Result<Self> {
        Self::new(distance.mapv(|d| 1.0 / (1.0 + d)), distance)
    }

    /// From the Gram matrix `(n, n)` of the vectors to compare.
    ///
    /// # Errors
    /// As [`SimilarityMatrix::from_similarities`].
    pub fn from_gram(gram: ArrayView2<'_, f64>, measure: Measure) -> Result<Self> {
        let n = gram.nrows();
        if gram.ncols() != n {
            return Err(Error::shape("Gram matrix", (n, n), gram.dim()));
        }
        Self::from_pairs(n, |i, j| Ok(measure.of_gram(gram[[i, i]], gram[[j, j]], gram[[i, j]])))
    }

    /// From a function of the pairs `i < j` that gives similarity and distance. The diagonal has
    /// similarity 1 and distance 0.
    ///
    /// # Errors
    /// Those of `pair`, and as [`SimilarityMatrix::from_similarities`].
    pub fn from_pairs(
        n: usize,
        mut pair: impl FnMut(usize, usize) -> Result<(f64, f64)>,
    ) -> Result<Self> {
        let (mut similarity, mut distance) = (Array2::eye(n), Array2::zeros((n, n)));
        for i in 0..n {
            for j in i + 1..n {
                let (s, d) = pair(i, j)?;
                (similarity[[i, j]], similarity[[j, i]]) = (s, s);
                (distance[[i, j]], distance[[j, i]]) = (d, d);
            }
        }
        Self::new(similarity, distance)
    }

    fn new(similarity: Array2<f64>, distance: Array2<f64>) -> Result<Self> {
        let n = similarity.nrows();
        if similarity.ncols() != n {
            return Err(Error::shape("similarity matrix", (n, n), similarity.dim()));
        }
        for (table, what) in [(&similarity, "similarity"), (&distance, "distance")] {
            check_finite_f64(what, table)?;
            for ((i, j), &x) in table.indexed_iter() {
                let y = table[[j, i]];
                if (x - y).abs() > 1e-9 * x.abs().max(y.abs()) {
                    let found = format!("{x} at ({i}, {j}) and {y} at ({j}, {i})");
                    return Err(Error::range(what, "a symmetric matrix", found));
                }
            }
        }
        if let Some(d) = distance.iter().find(|&&d| d < 0.0) {
            return Err(Error::range("distance", "0 or more", d));
        }
        Ok(Self { similarity, distance })
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.similarity.nrows()
    }

    /// `(n, n)` similarities; larger is more alike.
    pub fn similarities(&self) -> ArrayView2<'_, f64> {
        self.similarity.view()
    }

    /// `(n, n)` distances; 0 on the diagonal.
    pub fn distances(&self) -> ArrayView2<'_, f64> {
        self.distance.view()
    }

    /// The table of the experts `keep` only, in that order.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for an expert that does not exist.
    pub fn select(&self, keep: &[usize]) -> Result<Self> {
        if let Some(&bad) = keep.iter().find(|&&i| i >= self.experts()) {
            return Err(Error::range("expert", format!("below {}", self.experts()), bad));
        }
        let pick = |table: &Array2<f64>| {
            Array2::from_shape_fn((keep.len(), keep.len()), |(i, j)| table[[keep[i], keep[j]]])
        };
        Ok(Self { similarity: pick(&self.similarity), distance: pick(&self.distance) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn gram_gives_each_measure() {
        // x = (1, 0), y = (0, 2), z = 0
        let gram = array![[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]];
        let of = |m| SimilarityMatrix::from_gram(gram.view(), m).unwrap();
        assert_eq!(of(Measure::Cosine).similarities()[[0, 1]], 0.5);
        assert_eq!(of(Measure::Angular).distances()[[0, 1]], 0.5);
        assert_eq!(of(Measure::Euclidean).distances()[[1, 2]], 2.0);
        assert_eq!(of(Measure::Euclidean).distances()[[0, 1]], 5.0f64.sqrt());
        assert_eq!(of(Measure::Cosine).select(&[1, 0]).unwrap().experts(), 2);
    }

    #[test]
    fn asymmetric_non_finite_and_oblong_tables_are_refused() {
        let from = SimilarityMatrix::from_similarities;
        assert!(from(array![[1.0, 0.5], [0.4, 1.0]]).is_err());
        assert!(from(array![[1.0, f64::NAN], [f64::NAN, 1.0]]).is_err());
        assert!(from(array![[1.0, 0.5]]).is_err());
        assert!(SimilarityMatrix::from_distances(array![[0.0, -1.0], [-1.0, 0.0]]).is_err());
        let own = from(array![[1.0, 0.25], [0.25, 1.0]]).unwrap();
        assert_eq!(own.distances(), array![[0.0, 0.75], [0.75, 0.0]]);
    }
}
