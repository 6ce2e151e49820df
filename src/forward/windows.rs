//! Hidden states of several windows of text, stacked, and the rows of each.

use std::ops::Range;

use ndarray::{Array2, Axis};

use crate::error::{Error, Result};

/// Rows that go through attention together: bounds the memory of queries, keys and values.
const ROWS: usize = 4096;

/// Hidden states `(t, d_model)` of all windows, stacked, and the rows of each.
#[derive(Debug, Clone, PartialEq)]
pub struct Hidden {
    /// The states.
    pub states: Array2<f32>,
    /// The rows of each window, consecutive.
    pub windows: Vec<Range<usize>>,
}

/// Rows of the embedding table for all windows, stacked.
pub(crate) fn gather(table: &Array2<f32>, windows: &[impl AsRef<[u32]>]) -> Hidden {
    let mut end = 0;
    let mut rows = Vec::new();
    let mut ranges = Vec::with_capacity(windows.len());
    for window in windows.iter().map(AsRef::as_ref) {
        rows.extend(window.iter().map(|&t| t as usize));
        ranges.push(end..rows.len());
        end = rows.len();
    }
    Hidden { states: table.select(Axis(0), &rows), windows: ranges }
}

/// Windows must follow each other without gaps, be non-empty, and cover all rows.
pub(crate) fn check_windows(windows: &[Range<usize>], rows: usize) -> Result<()> {
    let mut end = 0;
    for window in windows {
        if window.start != end || window.end <= window.start {
            let found = format!("{window:?}");
            return Err(Error::range("window", format!("rows from {end}, at least one"), found));
        }
        end = window.end;
    }
    if end == rows { Ok(()) } else { Err(Error::shape("windows over all rows", rows, end)) }
}

/// Consecutive windows of about [`ROWS`] rows in all.
pub(crate) fn batches(windows: &[Range<usize>]) -> impl Iterator<Item = &[Range<usize>]> {
    let mut rest = windows;
    std::iter::from_fn(move || {
        let first = rest.first()?.start;
        let fits = rest.iter().take_while(|w| w.end - first <= ROWS).count();
        let (batch, later) = rest.split_at(fits.max(1));
        rest = later;
        Some(batch)
    })
}

/// Fails for a token id that has no row in the embedding.
pub(crate) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|&&t| t as usize >= vocab) {
        None => Ok(()),
        Some(t) => Err(Error::range("token id", format!("below the vocabulary of {vocab}"), t)),
    }
}
