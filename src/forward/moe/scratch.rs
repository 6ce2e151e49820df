//! Buffers that tasks hand on to each other. Fresh memory costs a page fault every 4 KiB, which for
//! expert activations added up to a seventh of the whole MoE block.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ndarray::{ArrayView2, ArrayViewMut2};

/// Buffers that no task uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Vec<f32>>>);

impl Pool {
    fn free(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        // A task that panicked left the list itself whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A matrix of `(rows, cols)` whose values are unspecified.
    pub(crate) fn take(&self, rows: usize, cols: usize) -> Scratch<'_> {
        let len = rows * cols;
        let mut free = self.free();
        let fits = free.iter().position(|buffer| buffer.len() >= len);
        let values = fits.map(|i| free.swap_remove(i));
        drop(free);
        // Powers of two, so that blocks of slightly different sizes share buffers.
        let values = values.unwrap_or_else(|| vec![0.0; len.next_power_of_two()]);
        Scratch { pool: self, values, rows, cols }
    }
}

/// A matrix from a [`Pool`], to which it returns.
#[derive(Debug)]
pub(crate) struct Scratch<'a> {
    pool: &'a Pool,
    values: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Scratch<'_> {
    /// All values, row by row.
    pub(crate) fn values(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.cols]
    }

    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }

    pub(crate) fn view(&self) -> ArrayView2<'_, f32> {
        let values = &self.values[..self.rows * self.cols];
        ArrayView2::from_shape((self.rows, self.cols), values).unwrap_or_else(|_| empty())
    }

    pub(crate) fn view_mut(&mut self) -> ArrayViewMut2<'_, f32> {
        let (rows, cols) = (self.rows, self.cols);
        let empty = ArrayViewMut2::from(&mut [] as &mut [[f32; 0]]);
        ArrayViewMut2::from_shape((rows, cols), self.values()).unwrap_or(empty)
    }
}

/// Never reached: the slice is cut to the shape.
fn empty<'a>() -> ArrayView2<'a, f32> {
    ArrayView2::from(&[] as &[[f32; 0]])
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.pool.free().push(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again() {
        let pool = Pool::default();
        let mut first = pool.take(3, 5);
        first.view_mut().fill(7.0);
        drop(first);
        let second = pool.take(4, 4);
        assert_eq!((second.view().dim(), second.row(2)), ((4, 4), &[7.0; 4][..]));
        assert!(pool.free().is_empty());
        let third = pool.take(1, 1);
        drop((second, third));
        assert_eq!(pool.free().len(), 2);
    }
}
