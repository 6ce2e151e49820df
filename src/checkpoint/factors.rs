//! A projection in factors on disk, in native folders: `{weight}.left` `(m, r)`, `{weight}.right`
//! `(r, n)`, `{weight}.rows` `(k, n)` and `{weight}.row_index` `(k)`, ascending, for
//! `W = L R + S` with `S` zero but for the rows. Either of `r` and `k` may be 0.

use ndarray::{Array2, s};
use serde::{Deserialize, Serialize};

use super::json::malformed;
use super::read;
use super::scan_layer::Piece;
use super::store::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::linalg::Cpu;
use crate::model::{Factored, Role, Structure};
use crate::stage::RankBudget;

/// What is kept of the matrices of a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Factoring {
    /// Of gate and up.
    pub hidden: RankBudget,
    /// Of down.
    pub down: RankBudget,
}

impl Factoring {
    pub(super) fn of(&self, role: Role) -> RankBudget {
        if role == Role::Down { self.down } else { self.hidden }
    }
}

/// One of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Factor {
    Left,
    Right,
    Rows,
    Index,
}

impl Factor {
    /// In the order in which they are written.
    pub(super) const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Rows, Self::Index];

    /// What stands behind the weight's name.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Rows => "rows",
            Self::Index => "row_index",
        }
    }
}

/// Whether a tensor holds the numbers of kept rows, which are no parameters.
pub(super) fn is_index(name: &str) -> bool {
    name.ends_with(".weight.row_index")
}

/// The tensors of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Factors {
    pub(super) left: Piece,
    pub(super) right: Piece,
    pub(super) rows: Piece,
    /// A row of `k`.
    pub(super) index: Piece,
}

impl Factors {
    pub(super) fn pieces(&self) -> [Piece; 4] {
        [self.left, self.right, self.rows, self.index]
    }

    /// Checks shapes and types of four tensors, in the order of [`Factor::ALL`].
    pub(super) fn scan(store: &Store, tensors: [Option<usize>; 4]) -> Result<Self> {
        let piece = |at: usize, axes: usize| {
            let missing = || {
                let name = Factor::ALL[at].suffix();
                malformed("factored projection", format!("there is no `{name}`"))
            };
            let tensor = tensors[at].ok_or_else(missing)?;
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
        let (left, right) = (piece(0, 2)?, piece(1, 2)?);
        let (rows, index) = (piece(2, 2)?, piece(3, 1)?);
        let fits =
            |piece: Piece, expected: (usize, usize)| match (piece.rows, piece.cols) == expected {
                true => Ok(()),
                false => Err(Error::shape("factor", expected, (piece.rows, piece.cols)))
                    .in_tensor(&store.entry(piece.tensor).name),
            };
        fits(right, (left.cols, right.cols))?;
        fits(rows, (index.cols, right.cols))?;
        let entry = store.entry(index.tensor);
        if entry.dtype.name() != "I32" {
            let (found, supported) = (entry.dtype.name().into(), "I32".into());
            let what = "data type of row numbers";
            return Err(ErrorKind::Unsupported { what, found, supported }.into())
                .in_tensor(&entry.name);
        }
        Ok(Self { left, right, rows, index })
    }

    /// `L R + S`.
    pub(super) fn dense(&self, store: &Store) -> Result<Array2<f32>> {
        let matrix =
            |piece: Piece| read::matrix((piece.rows, piece.cols), read::values(store, piece)?);
        let four = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let index = store.bytes(self.index.tensor).chunks_exact(4).map(four).collect();
        let (left, right, rows) = (matrix(self.left)?, matrix(self.right)?, matrix(self.rows)?);
        let at = &store.entry(self.left.tensor).name;
        Factored::new(left, right, Structure::Rows, index, rows)
            .and_then(|factored| factored.to_dense(&Cpu::sequential()))
            .in_tensor(at)
            .in_file(store.path(self.left.tensor))
    }

    /// `L` and `R` with zeros up to the planned rank, and the rows; in the order of the pieces.
    pub(super) fn values(&self, factored: &Factored) -> Result<[Vec<f32>; 3]> {
        let (rank, expected) = (factored.rank(), (self.left.rows, self.right.cols));
        let fits = factored.dim() == expected
            && rank <= self.left.cols
            && factored.structure() == Structure::Rows
            && factored.indices().len() == self.index.cols;
        if !fits {
            let expected = (expected, self.left.cols, self.index.cols);
            let found = (factored.dim(), rank, factored.indices().len());
            return Err(Error::shape("factors (shape, rank, rows)", expected, found));
        }
        let mut left = Array2::zeros((self.left.rows, self.left.cols));
        left.slice_mut(s![.., ..rank]).assign(&factored.left());
        let mut right = Array2::zeros((self.right.rows, self.right.cols));
        right.slice_mut(s![..rank, ..]).assign(&factored.right());
        let flat = |a: Array2<f32>| a.into_iter().collect();
        Ok([flat(left), flat(right), flat(factored.lines().to_owned())])
    }
}
