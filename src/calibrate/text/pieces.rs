//! A source on its way in, a piece at a time: what is kept of it is bounded.

// Without the feature `text` only token ids come in.
#![cfg_attr(not(feature = "text"), allow(dead_code))]

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bytes of a piece of text: longer documents are cut, at the end of a line if there is one.
const PIECE: usize = 64 << 10;
/// What a piece costs beside its text.
const OVERHEAD: usize = 96;

/// What of a source is kept when it is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// All of it.
    None,
    /// The first bytes.
    First(usize),
    /// Pieces drawn by a seed, each with the same probability.
    Sample(usize, u64),
}

/// A part of a document, or token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    Text(String),
    /// A part of a sequence of token ids.
    Ids(Vec<u32>),
    /// A window of token ids.
    Window(Vec<u32>),
}

impl Body {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Ids(ids) | Self::Window(ids) => 4 * ids.len(),
        }
    }
}

/// A part of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its place among all pieces of the source.
    pub(super) at: u64,
    /// The file, by its place in the source.
    pub(super) file: usize,
    /// Whether a document begins with it.
    pub(super) begins: bool,
    pub(super) body: Body,
}

/// What a file held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) documents: u64,
    /// Documents without text.
    pub(super) empty: u64,
    /// Padded positions of token ids.
    pub(super) padding: u64,
}

/// The pieces of a source that are kept.
///
/// With [`Limit::Sample`] every piece draws a number, and those with the smallest numbers stay: a
/// sample without replacement in one pass, whose memory does not grow with the source.
#[derive(Debug)]
pub(super) struct Pieces {
    limit: Limit,
    rng: ChaCha8Rng,
    kept: BTreeMap<(u64, u64), Piece>,
    bytes: usize,
    /// Bytes of all pieces, kept or not.
    total: u64,
    next: u64,
    /// The document that is being read.
    document: String,
    began: bool,
    counts: Vec<Counts>,
}

impl Pieces {
    /// An empty source; `number` tells it from the others, so that each draws its own numbers.
    pub(super) fn new(limit: Limit, number: u64) -> Self {
        let seed = if let Limit::Sample(_, seed) = limit { seed } else { 0 };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // The first stream draws the windows.
        rng.set_stream(1 + number);
        Self {
            limit,
            rng,
            kept: BTreeMap::new(),
            bytes: 0,
            total: 0,
            next: 0,
            document: String::new(),
            began: false,
            counts: Vec::new(),
        }
    }

    /// Begins the next file.
    pub(super) fn file(&mut self) {
        self.counts.push(Counts::default());
    }

    /// Whether nothing more will be kept.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.limit, Limit::First(most) if self.bytes >= most)
    }

    /// Adds to the document.
    pub(super) fn text(&mut self, mut text: &str) {
        while self.document.len() + text.len() >= 2 * PIECE {
            let end = floor_char(text, (2 * PIECE).saturating_sub(self.document.len()).max(4));
            self.document.push_str(&text[..end]);
            text = &text[end..];
            let cut = boundary(&self.document);
            let rest = self.document.split_off(cut);
            let piece = std::mem::replace(&mut self.document, rest);
            self.push_text(piece);
        }
        self.document.push_str(text);
    }

    /// Ends the document.
    pub(super) fn end_document(&mut self) {
        let rest = std::mem::take(&mut self.document);
        let empty = rest.is_empty() && !self.began;
        self.count(|counts| {
            counts.documents += 1;
            counts.empty += u64::from(empty);
        });
        if !rest.is_empty() {
            self.push_text(rest);
        }
        self.began = false;
    }

    fn push_text(&mut self, text: String) {
        let begins = !std::mem::replace(&mut self.began, true);
        self.push(Body::Text(text), begins);
    }

    /// Adds to what is counted of the file.
    pub(super) fn count(&mut self, add: impl FnOnce(&mut Counts)) {
        if let Some(counts) = self.counts.last_mut() {
            add(counts);
        }
    }

    /// Keeps a piece, if the limit allows.
    pub(super) fn push(&mut self, body: Body, begins: bool) {
        let (at, file) = (self.next, self.counts.len().saturating_sub(1));
        self.next += 1;
        let size = body.bytes();
        self.total += size as u64;
        let drawn = match self.limit {
            Limit::Sample(..) => self.rng.random(),
            _ => at,
        };
        if self.is_full() {
            return;
        }
        self.bytes += size + OVERHEAD;
        self.kept.insert((drawn, at), Piece { at, file, begins, body });
        let Limit::Sample(most, _) = self.limit else { return };
        while self.bytes > most && self.kept.len() > 1 {
            let Some((_, piece)) = self.kept.pop_last() else { return };
            self.bytes -= piece.body.bytes() + OVERHEAD;
        }
    }

    /// The kept pieces in their order, what the files held, and the bytes of the kept pieces if
    /// they are not all.
    pub(super) fn finish(self) -> (Vec<Piece>, Vec<Counts>, Option<u64>) {
        let mut pieces: Vec<Piece> = self.kept.into_values().collect();
        pieces.sort_unstable_by_key(|piece| piece.at);
        let kept: u64 = pieces.iter().map(|piece| piece.body.bytes() as u64).sum();
        (pieces, self.counts, (kept < self.total).then_some(kept))
    }
}

/// Where a text of two pieces is cut: behind the last line end of the second quarter that stands
/// between two words, so that the tokens on both sides are those of the whole text; else before its
/// last space; else in the middle.
fn boundary(text: &str) -> usize {
    let (low, high) = (floor_char(text, PIECE / 2), floor_char(text, PIECE));
    let bytes = text.as_bytes();
    let word = |i: usize| bytes.get(i).is_some_and(|b| !b.is_ascii_whitespace());
    let between = |i: &usize| *i > 0 && word(*i - 1) && word(*i + 1);
    let last = |byte: u8| (low..high).rev().filter(|&i| bytes[i] == byte).find(between);
    last(b'\n').map(|i| i + 1).or_else(|| last(b' ')).unwrap_or(high)
}

/// The last boundary of a character that is not behind `at`.
fn floor_char(text: &str, at: usize) -> usize {
    let at = at.min(text.len());
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(limit: Limit, documents: &[&str]) -> (Vec<Piece>, Option<u64>) {
        let mut pieces = Pieces::new(limit, 0);
        pieces.file();
        for document in documents {
            for part in document.as_bytes().chunks(1000) {
                pieces.text(std::str::from_utf8(part).unwrap());
            }
            pieces.end_document();
        }
        let (kept, _, sampled) = pieces.finish();
        (kept, sampled)
    }

    fn text(piece: &Piece) -> &str {
        match &piece.body {
            Body::Text(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn short_documents_stay_whole_and_long_ones_are_cut_at_lines() {
        let (pieces, sampled) = read(Limit::None, &["one", "", "two"]);
        assert_eq!(pieces.iter().map(text).collect::<Vec<_>>(), ["one", "two"]);
        assert!(pieces.iter().all(|piece| piece.begins) && sampled.is_none());
        let long = "a line of words\n".repeat(40_000);
        let (pieces, _) = read(Limit::None, &[&long]);
        assert!(pieces.len() > 5 && pieces.iter().all(|p| text(p).len() < 2 * PIECE));
        assert!(pieces.iter().all(|piece| text(piece).ends_with('\n')));
        assert_eq!(pieces.iter().filter(|piece| piece.begins).count(), 1);
        assert_eq!(pieces.iter().map(text).collect::<String>(), long);
        for long in ["x".repeat(300_000), "xxxx ".repeat(60_000)] {
            let (pieces, _) = read(Limit::None, &[&long]);
            assert_eq!(pieces.iter().map(text).collect::<String>(), long);
        }
    }

    #[test]
    fn samples_are_bounded_spread_and_follow_the_seed() {
        let documents: Vec<String> = (0..2000).map(|i| format!("{i:0>1000}")).collect();
        let all: Vec<&str> = documents.iter().map(String::as_str).collect();
        let (pieces, sampled) = read(Limit::Sample(200_000, 5), &all);
        let kept: usize = pieces.iter().map(|piece| text(piece).len()).sum();
        assert_eq!(sampled, Some(kept as u64));
        assert!((150_000..200_000).contains(&kept), "{kept}");
        assert!(pieces.is_sorted_by_key(|piece| piece.at));
        let late = pieces.iter().filter(|piece| piece.at >= 1000).count();
        assert!((60..120).contains(&late), "{late} of {}", pieces.len());
        assert_eq!(read(Limit::Sample(200_000, 5), &all).0, pieces);
        assert_ne!(read(Limit::Sample(200_000, 6), &all).0, pieces);
        assert_eq!(read(Limit::Sample(2_200_000, 6), &all), read(Limit::None, &all));
        let (first, sampled) = read(Limit::First(5000), &all);
        assert_eq!((first.len(), first[4].at, sampled), (5, 4, Some(5000)));
    }
}
