//! A projection in factors on disk, in native folders: `{weight}.left` `(m, r)`, `{weight}.right`
//! `(r, n)`, `{weight}.rows` `(k, n)` and `{weight}.row_index` `(k)`, ascending, for
//! `W = L R + S` with `S` zero but for the rows; `{weight}.columns` `(m, k)` and
//! `{weight}.column_index` `(k)` instead where columns are kept. Either of `r` and `k` may be 0.

use ndarray::{Array2, s};
use serde::{Deserialize, Serialize};

use super::scan_layer::Piece;
use crate::checkpoint::read::{Store, weights};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::linalg::Cpu;
use crate::model::{Factored, Structure};
use crate::stage::{Kept, RankBudget};

/// What is stored of the matrices of a layer's merged experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Factoring {
    experts: Vec<Vec<Kept>>,
}

impl Factoring {
    /// For each expert its matrices: gate (if any), up, down.
    pub fn new(experts: Vec<Vec<Kept>>) -> Self {
        Self { experts }
    }

    /// For each expert its matrices.
    pub fn experts(&self) -> &[Vec<Kept>] {
        &self.experts
    }

    /// The factors of matrix `at` of an expert; `None` when it stays dense.
    pub(crate) fn of(&self, expert: usize, at: usize) -> Option<(RankBudget, Structure)> {
        match *self.experts.get(expert)?.get(at)? {
            Kept::Dense => None,
            Kept::Factors { budget, structure } => Some((budget, structure)),
        }
    }
}

/// One of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Factor {
    Left,
    Right,
    Rows,
    RowIndex,
    Columns,
    ColumnIndex,
}

impl Factor {
    /// In the order in which they are written.
    pub(crate) const ALL: [Self; 6] =
        [Self::Left, Self::Right, Self::Rows, Self::RowIndex, Self::Columns, Self::ColumnIndex];

    /// The kept rows of a structure, and their numbers.
    pub(crate) const fn of(structure: Structure) -> [Self; 2] {
        match structure {
            Structure::Rows => [Self::Rows, Self::RowIndex],
            Structure::Columns => [Self::Columns, Self::ColumnIndex],
        }
    }

    /// What stands behind the weight's name.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Rows => "rows",
            Self::RowIndex => "row_index",
            Self::Columns => "columns",
            Self::ColumnIndex => "column_index",
        }
    }
}

/// Whether a tensor holds the numbers of kept rows, which are no parameters.
pub(crate) fn is_index(name: &str) -> bool {
    name.ends_with(".weight.row_index") || name.ends_with(".weight.column_index")
}

/// The tensors of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Factors {
    pub(crate) left: Piece,
    pub(crate) right: Piece,
    pub(crate) structure: Structure,
    /// The kept rows: `(k, n)` or `(m, k)`.
    pub(crate) lines: Piece,
    /// A row of `k`.
    pub(crate) index: Piece,
}

impl Factors {
    pub(crate) fn pieces(&self) -> [Piece; 4] {
        [self.left, self.right, self.lines, self.index]
    }

    /// Checks shapes and types of the tensors, in the order of [`Factor::ALL`].
    pub(crate) fn scan(store: &Store, tensors: [Option<usize>; 6]) -> Result<Self> {
        let piece = |factor: Factor, axes: usize| {
            let missing = || {
                let name = factor.suffix();
                Error::malformed("factored projection", format!("there is no `{name}`"))
            };
            let tensor = tensors[factor as usize].ok_or_else(missing)?;
            let (rows, cols) = match (axes, &store.entry(tensor).shape[..]) {
                (2, &[rows, cols]) => (rows, cols),
                (1, &[cols]) => (1, cols),
                (_, shape) => {
                    return Err(Error::shape("factor", format!("{axes} dimensions"), shape))
                        .in_tensor(&store.entry(tensor).name);
                }
            };
            Ok(Piece { tensor, start: 0, rows, cols })
        };
        let (left, right) = (piece(Factor::Left, 2)?, piece(Factor::Right, 2)?);
        let held = |by: Structure| Factor::of(by).map(|f| tensors[f as usize].is_some());
        let structure = match (held(Structure::Rows), held(Structure::Columns)) {
            (_, [false, false]) => Structure::Rows,
            ([false, false], _) => Structure::Columns,
            _ => return Err(Error::malformed("factored projection", "kept rows and kept columns")),
        };
        let [lines, index] = Factor::of(structure);
        let (lines, index) = (piece(lines, 2)?, piece(index, 1)?);
        let fits =
            |piece: Piece, expected: (usize, usize)| match (piece.rows, piece.cols) == expected {
                true => Ok(()),
                false => Err(Error::shape("factor", expected, (piece.rows, piece.cols)))
                    .in_tensor(&store.entry(piece.tensor).name),
            };
        fits(right, (left.cols, right.cols))?;
        fits(lines, kept_shape(structure, (left.rows, right.cols), index.cols))?;
        let entry = store.entry(index.tensor);
        if entry.dtype.name() != "I32" {
            let (found, supported) = (entry.dtype.name().into(), "I32".into());
            let what = "data type of the numbers of lines";
            return Err(ErrorKind::Unsupported { what, found, supported }.into())
                .in_tensor(&entry.name);
        }
        Ok(Self { left, right, structure, lines, index })
    }

    /// `L`, `R` and the kept rows.
    pub(crate) fn read(&self, store: &Store) -> Result<Factored> {
        let matrix = |piece: Piece| {
            weights::matrix((piece.rows, piece.cols), weights::values(store, piece)?)
        };
        let four = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let index = store.unchanged(self.index.tensor, || {
            Ok(store.bytes(self.index.tensor).chunks_exact(4).map(four).collect())
        })?;
        let (left, right, lines) = (matrix(self.left)?, matrix(self.right)?, matrix(self.lines)?);
        let at = &store.entry(self.left.tensor).name;
        Factored::new(left, right, self.structure, index, lines)
            .in_tensor(at)
            .in_file(store.path(self.left.tensor))
    }

    /// `L R + S`.
    pub(crate) fn dense(&self, store: &Store) -> Result<Array2<f32>> {
        let at = &store.entry(self.left.tensor).name;
        self.read(store)?
            .to_dense(&Cpu::sequential())
            .in_tensor(at)
            .in_file(store.path(self.left.tensor))
    }

    /// `L` and `R` with zeros up to the planned rank, and the lines; in the order of the pieces.
    pub(crate) fn values(&self, factored: &Factored) -> Result<[Vec<f32>; 3]> {
        let (rank, expected) = (factored.rank(), (self.left.rows, self.right.cols));
        let fits = factored.dim() == expected
            && rank <= self.left.cols
            && factored.structure() == self.structure
            && factored.indices().len() == self.index.cols;
        if !fits {
            let expected = (expected, self.left.cols, self.index.cols);
            let found = (factored.dim(), rank, factored.indices().len());
            return Err(Error::shape("factors (shape, rank, lines)", expected, found));
        }
        let mut left = Array2::zeros((self.left.rows, self.left.cols));
        left.slice_mut(s![.., ..rank]).assign(&factored.left());
        let mut right = Array2::zeros((self.right.rows, self.right.cols));
        right.slice_mut(s![..rank, ..]).assign(&factored.right());
        let flat = |a: Array2<f32>| a.into_iter().collect();
        Ok([flat(left), flat(right), flat(factored.kept().to_owned())])
    }
}

/// `(k, n)` or `(m, k)`: the shape of `k` kept rows of an `(m, n)` matrix.
pub(crate) const fn kept_shape(by: Structure, (m, n): (usize, usize), k: usize) -> (usize, usize) {
    match by {
        Structure::Rows => (k, n),
        Structure::Columns => (m, k),
    }
}
