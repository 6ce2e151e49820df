//! From pieces to tokens, and from tokens to windows.

use std::ops::Range;

use super::pieces::{Body, Piece};
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::par;

/// What is put between documents and before windows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Special {
    /// Before every window of text.
    pub(super) prefix: Vec<u32>,
    /// Between two documents.
    pub(super) separator: Option<u32>,
}

/// The tokens of a source, and the windows that they are cut into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cut {
    tokens: Vec<u32>,
    windows: Vec<Window>,
    /// Where the tokens of each piece begin, and its file.
    starts: Vec<(usize, usize)>,
    /// Tokens behind the last whole window of text.
    pub(super) left_over: usize,
    /// Where the run of text at the end begins.
    run: usize,
}

/// Some of the tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    range: Range<usize>,
    /// Whether the prefix stands before it.
    prefixed: bool,
}

/// Tokenises the pieces of a source and cuts them.
///
/// # Errors
/// Those of the tokenizer; [`OutOfRange`](crate::ErrorKind::OutOfRange) for a window of token ids
/// that is too long.
pub(super) fn cut(
    pieces: Vec<Piece>,
    vocabulary: Option<&Vocabulary>,
    (window, special): (usize, &Special),
) -> Result<Cut> {
    let encoded = par::map(pieces.len(), |i| match (&pieces[i].body, vocabulary) {
        (Body::Text(text), Some(vocabulary)) => Ok(Some(vocabulary.encode(text)?)),
        _ => Ok(None),
    })?;
    let mut cut = Cut::default();
    // Runs of text and runs of ids are cut apart: ids have no prefix.
    let mut text = None;
    let mut before = None;
    for (piece, encoded) in pieces.into_iter().zip(encoded) {
        let (tokens, is_text) = match (encoded, piece.body) {
            (Some(tokens), _) => (tokens, true),
            (None, Body::Ids(ids)) => (ids, false),
            (None, Body::Window(ids)) => {
                cut.end_run(text.take(), window, special);
                cut.row(ids, piece.file, window)?;
                continue;
            }
            (None, Body::Text(_)) => continue,
        };
        if text.is_some_and(|other| other != is_text) {
            cut.end_run(text, window, special);
        }
        text = Some(is_text);
        // A piece whose neighbour was not kept begins like a document.
        let begins = piece.begins || before != Some(piece.at.wrapping_sub(1));
        before = Some(piece.at);
        cut.add(&tokens, piece.file, begins.then_some(special.separator).flatten());
    }
    cut.end_run(text, window, special);
    Ok(cut)
}

impl Cut {
    /// The sources that are too short for a window, one behind the other; each stays as it is but
    /// for what it has left over.
    pub(super) fn join(parts: &mut [&mut Self], window: usize, special: &Special) -> Self {
        let mut joined = Self::default();
        for (file, part) in parts.iter_mut().enumerate() {
            joined.add(&part.tokens, file, special.separator);
            part.left_over = 0;
        }
        joined.end_run(Some(true), window, special);
        joined
    }

    /// Adds to the run at the end; the separator comes before it unless something is missing there.
    fn add(&mut self, tokens: &[u32], file: usize, separator: Option<u32>) {
        if let Some(separator) = separator
            && self.tokens.len() > self.run
            && self.tokens.last() != Some(&separator)
            && !tokens.is_empty()
        {
            self.tokens.push(separator);
        }
        self.starts.push((self.tokens.len(), file));
        self.tokens.extend_from_slice(tokens);
    }

    /// A window of token ids.
    fn row(&mut self, ids: Vec<u32>, file: usize, window: usize) -> Result<()> {
        if ids.len() > window {
            let expected = format!("windows of at most {window} tokens");
            return Err(Error::range("token ids", expected, ids.len()));
        }
        let start = self.tokens.len();
        self.starts.push((start, file));
        self.tokens.extend(ids);
        self.windows.push(Window { range: start..self.tokens.len(), prefixed: false });
        self.run = self.tokens.len();
        Ok(())
    }

    /// Cuts the run at the end into windows that do not overlap.
    fn end_run(&mut self, text: Option<bool>, window: usize, special: &Special) {
        let prefix: &[u32] = if text == Some(true) { &special.prefix } else { &[] };
        let mut start = self.run;
        loop {
            // A prefix that stands in the text already, from a chat template, is not repeated.
            let prefixed = !prefix.is_empty() && !self.tokens[start..].starts_with(prefix);
            let length = window - if prefixed { prefix.len() } else { 0 };
            if length == 0 || self.tokens.len() - start < length {
                break;
            }
            self.windows.push(Window { range: start..start + length, prefixed });
            start += length;
        }
        self.left_over += self.tokens.len() - start;
        self.run = self.tokens.len();
    }

    /// Number of windows.
    pub(super) fn available(&self) -> usize {
        self.windows.len()
    }

    /// Number of tokens, separators included, prefixes not.
    pub(super) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Some windows, in order.
    pub(super) fn take(&self, chosen: &[usize], special: &Special) -> Vec<Vec<u32>> {
        let one = |&i: &usize| {
            let Window { range, prefixed } = &self.windows[i];
            let prefix: &[u32] = if *prefixed { &special.prefix } else { &[] };
            [prefix, &self.tokens[range.clone()]].concat()
        };
        chosen.iter().map(one).collect()
    }

    /// Tokens of each file, and how many of the chosen windows begin in it.
    pub(super) fn by_file(&self, files: usize, chosen: &[usize]) -> Vec<(u64, u64)> {
        let mut counts = vec![(0, 0); files];
        for (i, &(start, file)) in self.starts.iter().enumerate() {
            let end = self.starts.get(i + 1).map_or(self.tokens.len(), |next| next.0);
            // Sources that are joined from others have no files of their own.
            if let Some(count) = counts.get_mut(file) {
                count.0 += (end - start) as u64;
            }
        }
        for &i in chosen {
            let start = self.windows[i].range.start;
            let at = self.starts.partition_point(|&(begin, _)| begin <= start);
            let file = at.checked_sub(1).and_then(|at| self.starts.get(at)).map(|start| start.1);
            if let Some(count) = file.and_then(|file| counts.get_mut(file)) {
                count.1 += 1;
            }
        }
        counts
    }

    /// The first token that the model does not have, with its window.
    pub(super) fn beyond(&self, vocab: usize, special: &Special) -> Option<(usize, u32)> {
        let known = |id: &&u32| **id as usize >= vocab;
        if let Some(&id) =
            special.prefix.iter().find(known).filter(|_| self.windows.iter().any(|w| w.prefixed))
        {
            return Some((0, id));
        }
        self.windows.iter().enumerate().find_map(|(w, window)| {
            Some((w, *self.tokens[window.range.clone()].iter().find(known)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(at: u64, file: usize, begins: bool, ids: Vec<u32>) -> Piece {
        Piece { at, file, begins, body: Body::Ids(ids) }
    }

    fn all(cut: &Cut, special: &Special) -> Vec<Vec<u32>> {
        cut.take(&(0..cut.available()).collect::<Vec<_>>(), special)
    }

    #[test]
    fn documents_are_joined_by_the_separator_once() {
        let special = Special { prefix: Vec::new(), separator: Some(0) };
        let pieces = vec![
            ids(0, 0, true, vec![1, 2]),
            ids(1, 0, false, vec![3]),
            ids(2, 1, true, vec![4, 0]),
            ids(3, 2, true, vec![5, 6, 7]),
        ];
        let found = cut(pieces, None, (3, &special)).unwrap();
        assert_eq!(all(&found, &special), [[1, 2, 3], [0, 4, 0], [5, 6, 7]]);
        assert_eq!((found.left_over, found.tokens()), (0, 9));
        assert_eq!(found.by_file(3, &[0, 1, 2]), [(4, 2), (2, 0), (3, 1)]);
        assert_eq!(found.beyond(7, &special), Some((2, 7)));
    }

    #[test]
    fn the_prefix_takes_its_place_in_the_window_and_is_not_repeated() {
        let special = Special { prefix: vec![9], separator: None };
        let mut found = Cut::default();
        found.add(&[1, 2, 9, 3, 4, 5, 6], 0, None);
        found.end_run(Some(true), 3, &special);
        assert_eq!(all(&found, &special), [[9, 1, 2], [9, 3, 4], [9, 5, 6]]);
        let mut short = [Cut::default(), Cut::default()];
        short.iter_mut().for_each(|cut| cut.add(&[1, 2, 3], 0, None));
        let [first, second] = &mut short;
        let joined = Cut::join(&mut [first, second], 4, &special);
        assert_eq!(all(&joined, &special), [[9, 1, 2, 3], [9, 1, 2, 3]]);
    }

    #[test]
    fn rows_are_windows_of_their_own_and_may_not_be_too_long() {
        let special = Special::default();
        let row = |at, ids| Piece { at, file: 0, begins: true, body: Body::Window(ids) };
        let pieces = vec![ids(0, 0, true, vec![1, 2, 3]), row(1, vec![4]), row(2, vec![5, 6])];
        let found = cut(pieces, None, (2, &special)).unwrap();
        assert_eq!(all(&found, &special), [vec![1, 2], vec![4], vec![5, 6]]);
        assert_eq!(found.left_over, 1);
        let error = cut(vec![row(0, vec![1, 2, 3])], None, (2, &special)).unwrap_err();
        assert!(error.to_string().contains("at most 2 tokens, found 3"), "{error}");
    }
}
