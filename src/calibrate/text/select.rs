//! Which windows of a text are used.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Which windows are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// All.
    #[default]
    All,
    /// The first of every file, the same number of each: this many over all files, rounded down,
    /// but at least one of each.
    Windows(usize),
    /// Windows drawn from all files without replacement, as many as fit in this number of tokens,
    /// at least one; in the order of the text. The seed decides which.
    Tokens(usize),
}

/// How text is cut and chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextOptions {
    /// Tokens per window.
    pub window: usize,
    /// Which windows are used.
    #[serde(default)]
    pub select: Select,
    /// Seed of the drawing.
    #[serde(default)]
    pub seed: u64,
}

impl TextOptions {
    /// All windows of this length.
    pub fn new(window: usize) -> Self {
        Self { window, select: Select::All, seed: 0 }
    }

    /// The same with another choice of windows.
    #[must_use]
    pub fn select(mut self, select: Select) -> Self {
        self.select = select;
        self
    }
}

/// Reduces the windows of every file to those that are used.
pub(super) fn choose(files: &mut [Vec<Vec<u32>>], options: &TextOptions) {
    match options.select {
        Select::All => {}
        Select::Windows(n) => {
            let each = (n / files.len().max(1)).max(1);
            files.iter_mut().for_each(|windows| windows.truncate(each));
        }
        Select::Tokens(tokens) => {
            let all: usize = files.iter().map(Vec::len).sum();
            let wanted = (tokens / options.window.max(1)).max(1);
            let mut drawn = draw(all, wanted, options.seed).into_iter();
            for windows in files {
                windows.retain(|_| drawn.next().unwrap_or(false));
            }
        }
    }
}

/// Which of `all` are among `wanted` drawn ones: the first of a Fisher–Yates shuffle.
fn draw(all: usize, wanted: usize, seed: u64) -> Vec<bool> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..all).collect();
    let mut drawn = vec![false; all];
    for i in 0..wanted.min(all) {
        let j = rng.random_range(i..all);
        order.swap(i, j);
        drawn[order[i]] = true;
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Vec<Vec<Vec<u32>>> {
        vec![(0..5).map(|i| vec![i; 4]).collect(), (5..12).map(|i| vec![i; 4]).collect()]
    }

    #[test]
    fn the_first_of_each_file() {
        let mut windows = files();
        choose(&mut windows, &TextOptions::new(4).select(Select::Windows(5)));
        assert_eq!(windows.concat(), [vec![0; 4], vec![1; 4], vec![5; 4], vec![6; 4]]);
    }

    #[test]
    fn drawn_windows_fit_the_tokens_stay_in_order_and_follow_the_seed() {
        let drawn = |tokens, seed| {
            let mut windows = files();
            let options = TextOptions { window: 4, select: Select::Tokens(tokens), seed };
            choose(&mut windows, &options);
            windows.concat().into_iter().map(|w| w[0]).collect::<Vec<_>>()
        };
        let first = drawn(19, 1);
        assert_eq!((first.len(), first.is_sorted()), (4, true));
        assert_eq!(drawn(19, 1), first);
        assert!((2..9).any(|seed| drawn(19, seed) != first));
        assert_eq!(drawn(1_000, 1), (0..12).collect::<Vec<_>>());
        assert_eq!(drawn(0, 1).len(), 1);
    }
}
