//! Span corruption, the task that encoder-decoder models of the T5 kind are trained on.

use serde::{Deserialize, Serialize};

use super::pcg64::Pcg64;
use crate::error::{Error, Result};

/// T5's span corruption (arXiv 1910.10683, §3.1.4): of `n` tokens, `round(density · n)` in
/// `round(that / mean_span)` spans are replaced by one sentinel each; the targets are the sentinels
/// and what they hide. Both sequences end with the end token.
///
/// Lengths of hidden and kept spans are two random compositions. The draws are those of
/// `numpy.random.default_rng(seed)`, so a reference script can make the same pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpanCorruption {
    /// Share of the tokens that are hidden.
    pub density: f64,
    /// Mean number of tokens of a hidden span.
    pub mean_span: f64,
    /// Ids of the sentinels, in order of use; there are at most that many spans.
    pub sentinels: Vec<u32>,
    /// The end token.
    pub end: u32,
}

impl SpanCorruption {
    /// Density 0.15 and mean span 3, as T5 and Switch were trained.
    pub fn new(sentinels: Vec<u32>, end: u32) -> Self {
        Self { density: 0.15, mean_span: 3.0, sentinels, end }
    }

    /// The input and the targets made from `tokens`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for fewer than 2 or more than 10,000
    /// tokens, no sentinels, or a density and mean span that leave a span empty.
    pub fn corrupt(&self, tokens: &[u32], seed: u64) -> Result<(Vec<u32>, Vec<u32>)> {
        let n = tokens.len();
        if !(2..=10_000).contains(&n) {
            return Err(Error::range("window for span corruption", "2 to 10,000 tokens", n));
        }
        let round = |x: f64| (x.round_ties_even() as usize).max(1);
        let hidden = round(n as f64 * self.density);
        let spans = round(hidden as f64 / self.mean_span).min(self.sentinels.len());
        if spans == 0 {
            return Err(Error::range("sentinels for span corruption", "at least one", 0));
        }
        if hidden < spans || n < hidden + spans {
            let found = format!("{hidden} of {n} tokens in {spans} spans");
            return Err(Error::range("hidden tokens", "a token in and between all spans", found));
        }
        let mut rng = Pcg64::seeded(seed);
        let lengths = composition(&mut rng, hidden, spans);
        let gaps = composition(&mut rng, n - hidden, spans);
        let (mut input, mut targets) = (Vec::new(), Vec::new());
        let mut rest = tokens;
        for ((gap, length), &sentinel) in gaps.into_iter().zip(lengths).zip(&self.sentinels) {
            let (kept, after) = rest.split_at(gap);
            let (span, after) = after.split_at(length);
            input.extend_from_slice(kept);
            input.push(sentinel);
            targets.push(sentinel);
            targets.extend_from_slice(span);
            rest = after;
        }
        input.push(self.end);
        targets.push(self.end);
        Ok((input, targets))
    }
}

/// `parts` positive lengths that sum to `total`.
fn composition(rng: &mut Pcg64, total: usize, parts: usize) -> Vec<usize> {
    let mut cuts = match parts {
        0 | 1 => Vec::new(),
        _ => rng.choice(total as u32 - 1, parts as u32 - 1),
    };
    cuts.sort_unstable();
    let mut start = 0;
    let ends = cuts.into_iter().map(|cut| cut as usize + 1).chain([total]);
    ends.map(|end| end - std::mem::replace(&mut start, end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t5() -> SpanCorruption {
        SpanCorruption::new((2..66).collect(), 1)
    }

    #[test]
    fn pairs_are_those_of_the_reference_script() {
        // 40 tokens 100, 101, …, seed 3001.
        let tokens: Vec<u32> = (100..140).collect();
        let (input, targets) = t5().corrupt(&tokens, 3001).unwrap();
        assert_eq!(targets, [2, 131, 132, 3, 136, 137, 138, 139, 1]);
        assert_eq!(
            input,
            [
                100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115,
                116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 2, 133,
                134, 135, 3, 1
            ]
        );
    }

    #[test]
    fn every_token_is_in_one_of_both() {
        for n in [2, 3, 7, 50, 256, 1000] {
            let tokens: Vec<u32> = (1000..1000 + n).collect();
            let (input, targets) = t5().corrupt(&tokens, u64::from(n)).unwrap();
            let mut all: Vec<u32> = [input, targets].concat();
            all.retain(|&t| t >= 1000);
            all.sort_unstable();
            assert_eq!(all, tokens);
        }
    }

    #[test]
    fn impossible_corruptions_are_refused() {
        assert!(t5().corrupt(&[1], 0).is_err());
        assert!(SpanCorruption::new(Vec::new(), 1).corrupt(&[1; 9], 0).is_err());
        assert!(SpanCorruption { density: 0.9, ..t5() }.corrupt(&[1; 90], 0).is_err());
        assert!(SpanCorruption { mean_span: 0.1, ..t5() }.corrupt(&[1; 90], 0).is_err());
    }
}
