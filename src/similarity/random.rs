//! Random similarities: a baseline.

use ndarray::Array2;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::{SimilarityMatrix, Stack};
use crate::stage::{Context, LayerView, Similarity, Stage};

/// `s_ij` uniform on `[0, 1)`, symmetric, 1 on the diagonal; distance `1 − s_ij`.
///
/// Drawn in the order `(0, 1), (0, 2), …` from a generator seeded by the context's seed and the
/// layer's identity, so that a layer's table depends neither on the other layers nor on the number
/// of threads. Cost: `O(n²)`.
///
/// Source: M-SMoE (arXiv 2310.01334), ablation `random` of the paper's code. *Deviations*: the
/// generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Random {}

impl Stage for Random {
    fn name(&self) -> &str {
        "random"
    }
}

impl Similarity for Random {
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix> {
        let stack: u64 = match layer.id.stack {
            Stack::Causal => 0,
            Stack::Encoder => 1,
            Stack::Decoder => 2,
        };
        let mut seed = [0; 32];
        let words = [cx.seed(), stack, layer.id.index as u64];
        for (bytes, word) in seed.chunks_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut source = ChaCha8Rng::from_seed(seed);
        let n = layer.len();
        let mut table = Array2::<f64>::zeros((n, n));
        for i in 0..n {
            for j in i + 1..n {
                // The 53 high bits: every multiple of 2⁻⁵³ below 1.
                table[[i, j]] = (source.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            }
        }
        SimilarityMatrix::from_pairs(n, |i, j| Ok((table[[i, j]], 1.0 - table[[i, j]])))
    }
}
