//! Keys and values of tokens that were already seen.

use ndarray::{Array2, ArrayView2};

use super::softmax::Span;
use crate::error::{Error, Result};

/// Keys and values of the tokens of one window that were already seen, in one layer. New rows are
/// appended in place: a token costs its own row, not a copy of all before.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cache {
    keys: Rows,
    values: Rows,
}

impl Cache {
    /// Number of tokens held.
    pub(crate) fn len(&self) -> usize {
        self.keys.count
    }

    /// Appends new rows and returns all of them.
    pub(crate) fn extend(&mut self, [k, v]: [Array2<f32>; 2]) -> Result<[ArrayView2<'_, f32>; 2]> {
        self.keys.append(&k)?;
        self.values.append(&v)?;
        Ok([self.keys.view()?, self.values.view()?])
    }
}

/// Keys and values of many sequences side by side in one layer, all at the same position.
#[derive(Debug, Clone)]
pub(crate) struct SequenceCache {
    sequences: usize,
    /// Positions that there is room for, in every sequence.
    room: usize,
    filled: usize,
    /// `(sequences · room, width)` each, the positions of a sequence one after the other.
    keys_values: Option<[Array2<f32>; 2]>,
}

impl SequenceCache {
    pub(crate) fn new(sequences: usize, room: usize) -> Self {
        Self { sequences, room, filled: 0, keys_values: None }
    }

    /// Number of positions held.
    pub(crate) fn len(&self) -> usize {
        self.filled
    }

    /// Adds the next position: one row a sequence.
    pub(crate) fn extend(&mut self, new: [Array2<f32>; 2]) -> Result<()> {
        let rows = new[0].nrows();
        if rows != self.sequences || self.filled >= self.room {
            let expected = (self.sequences, self.room);
            return Err(Error::shape("cache of sequences", expected, (rows, self.filled + 1)));
        }
        let room = self.room;
        let [k, v] = self.keys_values.get_or_insert_with(|| {
            [&new[0], &new[1]].map(|x| Array2::zeros((rows * room, x.ncols())))
        });
        for (all, new) in [&mut *k, &mut *v].into_iter().zip(&new) {
            for (i, row) in new.rows().into_iter().enumerate() {
                all.row_mut(i * room + self.filled).assign(&row);
            }
        }
        self.filled += 1;
        Ok(())
    }

    pub(crate) fn views(&self) -> Result<[ArrayView2<'_, f32>; 2]> {
        let found = self.keys_values.as_ref();
        let [k, v] = found.ok_or_else(|| Error::shape("cache of sequences", "a position", 0))?;
        Ok([k.view(), v.view()])
    }

    /// Which keys the row of each sequence looks at.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let span =
            |i: usize| Span { queries: i..i + 1, keys: i * self.room..i * self.room + self.filled };
        (0..self.sequences).map(span).collect()
    }
}

/// A matrix that grows by rows.
#[derive(Debug, Clone, Default)]
struct Rows {
    data: Vec<f32>,
    count: usize,
    width: usize,
}

impl Rows {
    fn append(&mut self, rows: &Array2<f32>) -> Result<()> {
        if self.count > 0 && self.width != rows.ncols() {
            return Err(Error::shape("key-value cache", self.width, rows.ncols()));
        }
        self.width = rows.ncols();
        self.count += rows.nrows();
        self.data.extend(rows);
        Ok(())
    }

    fn view(&self) -> Result<ArrayView2<'_, f32>> {
        ArrayView2::from_shape((self.count, self.width), &self.data)
            .map_err(|_| Error::shape("key-value cache", self.count * self.width, self.data.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_appended_in_order() {
        let mut cache = Cache::default();
        let rows = |n: usize, from: usize| {
            Array2::from_shape_fn((n, 3), |(i, j)| ((from + i) * 3 + j) as f32)
        };
        cache.extend([rows(2, 0), rows(2, 10)]).unwrap();
        let [k, v] = cache.extend([rows(1, 2), rows(1, 12)]).unwrap();
        assert_eq!((k, v), (rows(3, 0).view(), rows(3, 10).view()));
        assert_eq!(cache.len(), 3);
        assert!(cache.extend([Array2::zeros((1, 2)), rows(1, 13)]).is_err());
    }
}
