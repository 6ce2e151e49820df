//! Turning queries and keys by the angles of their positions.

use std::ops::Range;

use ndarray::Array2;

use crate::error::{Error, Result};
use crate::families::{Pairing, Rope};
use crate::par;

/// The rotation of every row: `(rows, dim)`, cosines then sines.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    table: Array2<f32>,
    half: usize,
    pairing: Pairing,
}

impl Rotation {
    /// Cosines and sines for rows that hold `spans`, each a piece of a window: its rows, and how
    /// many tokens of the same window came before.
    pub(crate) fn new(rope: &Rope, spans: &[(Range<usize>, usize)]) -> Self {
        let amplitude = rope.amplitude();
        let rows = spans.last().map_or(0, |(rows, _)| rows.end);
        let half = rope.dim / 2;
        let mut table = Array2::zeros((rows, rope.dim));
        for (span, past) in spans {
            let frequencies = rope.frequencies(span.len() + past);
            for (i, row) in span.clone().enumerate() {
                let position = (past + i) as f32;
                for (j, f) in frequencies.iter().enumerate() {
                    let (sin, cos) = f64::from(position * f).sin_cos();
                    table[[row, j]] = cos as f32 * amplitude;
                    table[[row, half + j]] = sin as f32 * amplitude;
                }
            }
        }
        Self { table, half, pairing: rope.pairing }
    }

    /// Rotates, in every row of `X: (t, heads · width)`, the dimensions from `start` of each head.
    pub(crate) fn apply(&self, x: &mut Array2<f32>, width: usize, start: usize) -> Result<()> {
        const ROWS: usize = 64;
        let (rows, cols) = x.dim();
        if rows != self.table.nrows() || start + 2 * self.half > width {
            return Err(Error::shape("rotary embedding", self.table.dim(), (rows, width)));
        }
        let Some(values) = x.as_slice_mut() else {
            return Err(Error::bug("queries or keys are not in memory order"));
        };
        par::for_each_chunk(values, ROWS * cols, |chunk, block| {
            for (i, row) in block.chunks_exact_mut(cols).enumerate() {
                let angles = self.table.row(chunk * ROWS + i);
                let Some((cos, sin)) =
                    angles.to_slice().and_then(|a| a.split_at_checked(self.half))
                else {
                    continue;
                };
                for head in row.chunks_exact_mut(width) {
                    turn(&mut head[start..start + 2 * self.half], cos, sin, self.pairing);
                }
            }
        });
        Ok(())
    }
}

fn turn(head: &mut [f32], cos: &[f32], sin: &[f32], pairing: Pairing) {
    let one = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    };
    let angles = cos.iter().zip(sin);
    match pairing {
        Pairing::Halves => {
            let (first, second) = head.split_at_mut(cos.len());
            let pairs = first.iter_mut().zip(second);
            pairs.zip(angles).for_each(|((a, b), (&c, &s))| one(a, b, c, s));
        }
        Pairing::Neighbours => {
            let (pairs, _) = head.as_chunks_mut::<2>();
            pairs.iter_mut().zip(angles).for_each(|([a, b], (&c, &s))| one(a, b, c, s));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::{Keys, RopeDefaults};

    #[test]
    fn both_pairings_turn_by_the_angle() {
        let config = serde_json::json!({"max_position_embeddings": 8});
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            let defaults = RopeDefaults { pairing, ..RopeDefaults::theta(1e4) };
            let rope = Rope::parse(Keys::root(&config), 2, defaults).unwrap();
            let rotation = Rotation::new(&rope, &[(0..2, 1)]);
            let mut x = ndarray::array![[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]];
            rotation.apply(&mut x, 3, 1).unwrap();
            let expected =
                ndarray::array![[9.0, 1f32.cos(), 1f32.sin()], [9.0, -(2f32.sin()), 2f32.cos()]];
            approx::assert_abs_diff_eq!(x, expected, epsilon = 1e-6);
        }
    }
}
