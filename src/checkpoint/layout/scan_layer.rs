//! One MoE layer on disk: which bytes hold which projection of which expert, and that they fit.

use std::collections::{BTreeMap, BTreeSet};

use super::factors::{Factors, is_index};
use super::names::{Experts, Part};
use super::scan::{Block, FORMAT};
use super::scan_fused::{flat, fused, interleaved};
use crate::checkpoint::read::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{LayerId, Role};
use crate::tensor_file::FLOATS;

/// A contiguous part of a tensor: a matrix `(rows, cols)`, or a vector with one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Position in the store.
    pub(crate) tensor: usize,
    /// First byte, counted in the tensor.
    pub(crate) start: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

/// A projection on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Projection {
    pub(crate) role: Role,
    pub(crate) weight: Piece,
    pub(crate) bias: Option<Piece>,
    pub(crate) order: Order,
    /// In native folders; `weight` then has the tensor of `L` and the shape of `W`.
    pub(crate) factors: Option<Factors>,
}

impl Projection {
    /// The tensors that it is in.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = usize> {
        let factors = self.factors.iter().flat_map(|f| f.pieces().map(|p| p.tensor));
        [Some(self.weight), self.bias].into_iter().flatten().map(|p| p.tensor).chain(factors)
    }
}

/// Where a projection lies among those that share its tensor.
///
/// Its pieces then begin where the expert's part of the tensor begins, and that part, the slab, is
/// `(parts · rows, cols)`, or the transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Order {
    /// Its rows are `first`, `first + step`, ….
    pub(crate) first: usize,
    pub(crate) step: usize,
    pub(crate) parts: usize,
    /// Whether the weight's slab is `(cols, parts · rows)`.
    pub(crate) transposed: bool,
}

impl Order {
    /// Alone, row by row.
    pub(crate) const PLAIN: Self = Self { first: 0, step: 1, parts: 1, transposed: false };

    /// The same without transposition, as biases are.
    pub(crate) fn upright(self) -> Self {
        Self { transposed: false, ..self }
    }

    /// The whole slab that `piece` is of.
    pub(crate) fn slab(self, piece: Piece) -> Piece {
        Piece { rows: 1, cols: piece.rows * piece.cols * self.parts, ..piece }
    }

    /// Calls `each` with the index of every value of a `(rows, cols)` piece, there and in the slab.
    pub(crate) fn walk(self, (rows, cols): (usize, usize), mut each: impl FnMut(usize, usize)) {
        let total = rows * self.parts;
        // In bands of rows, so that either side stays in the cache.
        for band in (0..rows).step_by(BAND) {
            let band = band..rows.min(band + BAND);
            if self.transposed {
                for col in 0..cols {
                    for row in band.clone() {
                        let slab = col * total + self.first + row * self.step;
                        each(row * cols + col, slab);
                    }
                }
            } else {
                for row in band {
                    let slab = (self.first + row * self.step) * cols;
                    (0..cols).for_each(|col| each(row * cols + col, slab + col));
                }
            }
        }
    }
}

/// Rows walked at a time.
const BAND: usize = 64;

/// The tensors of one MoE layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerTensors {
    pub(crate) id: LayerId,
    pub(crate) router: usize,
    pub(crate) router_bias: Option<usize>,
    pub(crate) correction: Option<usize>,
    /// Per expert its projections, gate (if any), up, down.
    pub(crate) experts: Vec<Vec<Projection>>,
}

impl LayerTensors {
    /// The tensors besides the experts'.
    pub(crate) fn routing(&self) -> impl Iterator<Item = usize> {
        [Some(self.router), self.router_bias, self.correction].into_iter().flatten()
    }

    /// The experts' tensors, each once.
    pub(crate) fn expert_tensors(&self) -> BTreeSet<usize> {
        self.experts.iter().flatten().flat_map(Projection::tensors).collect()
    }
}

/// Assembles and checks the layer of a block; `merged` experts, else as many as router rows.
pub(crate) fn layer(
    store: &Store,
    id: LayerId,
    block: &Block,
    merged: Option<usize>,
) -> Result<LayerTensors> {
    let named = |names: &[&str]| {
        names.iter().find_map(|name| store.get(&format!("{}{name}", block.prefix)))
    };
    let router = named(block.layout.router).ok_or_else(|| {
        let names = block.layout.router.join(" or ");
        Error::malformed(FORMAT, format!("no router: expected {}{names}", block.prefix))
    })?;
    let experts = match block.layout.experts {
        Experts::Each { .. } => each(store, block)?,
        Experts::Fused { .. } => fused(store, block, router)?,
        Experts::Interleaved { .. } => interleaved(store, block)?,
        Experts::Flat { .. } => flat(store, block, router, merged)?,
    };
    let layer = LayerTensors {
        id,
        router,
        router_bias: named(block.layout.router_bias),
        correction: named(block.layout.correction),
        experts,
    };
    check(store, &layer)?;
    Ok(layer)
}

/// The tensors of a projection.
#[derive(Clone, Copy, Default)]
struct Found {
    weight: Option<usize>,
    bias: Option<usize>,
    factors: [Option<usize>; 6],
}

/// The experts of a layout with tensors of their own: `0..N`, each complete.
fn each(store: &Store, block: &Block) -> Result<Vec<Vec<Projection>>> {
    let mut found: BTreeMap<(usize, Role), Found> = BTreeMap::new();
    for &(part, tensor) in &block.parts {
        match part {
            Part::Weight(i, role) => found.entry((i, role)).or_default().weight = Some(tensor),
            Part::Bias(i, role) => found.entry((i, role)).or_default().bias = Some(tensor),
            Part::Factor(i, role, factor) => {
                found.entry((i, role)).or_default().factors[factor as usize] = Some(tensor);
            }
            _ => {}
        }
    }
    let gated = block.layout.is_gated();
    let roles = [Role::Gate, Role::Up, Role::Down].into_iter().skip(usize::from(!gated));
    let count = found.keys().map(|(i, _)| i.saturating_add(1)).max().unwrap_or(0);
    let present: BTreeSet<usize> = found.keys().map(|(i, _)| *i).collect();
    if let Some(missing) = (0..count).take(present.len() + 1).find(|i| !present.contains(i)) {
        let reason = format!("expert {missing} is missing of 0..{count}");
        return Err(Error::malformed(FORMAT, reason)).in_expert(missing);
    }
    let expert = |i: usize| {
        let projection = |role| {
            let Found { weight, bias, factors } =
                found.get(&(i, role)).copied().unwrap_or_default();
            let bias = bias.map(|b| whole(store, b, 1)).transpose()?;
            let order = Order::PLAIN;
            if weight.is_none() && factors.iter().any(Option::is_some) {
                let factors = Factors::scan(store, factors)?;
                let weight = Piece { cols: factors.right.cols, ..factors.left };
                return Ok(Projection { role, weight, bias, order, factors: Some(factors) });
            }
            let weight = weight.ok_or_else(|| {
                let reason = format!("expert {i} has no {role} projection");
                Error::malformed(FORMAT, reason)
            })?;
            if factors.iter().any(Option::is_some) {
                let reason = format!("{role} projection of expert {i}, dense and in factors");
                return Err(Error::malformed(FORMAT, reason));
            }
            let weight = whole(store, weight, 2)?;
            Ok(Projection { role, weight, bias, order, factors: None })
        };
        roles.clone().map(projection).collect::<Result<Vec<_>>>().in_expert(i)
    };
    (0..count).map(expert).collect()
}

/// A whole tensor as a piece.
fn whole(store: &Store, tensor: usize, dims: usize) -> Result<Piece> {
    let entry = store.entry(tensor);
    let (rows, cols) = match (dims, &entry.shape[..]) {
        (2, &[rows, cols]) => (rows, cols),
        (1, &[cols]) => (1, cols),
        (_, shape) => {
            let expected = format!("{dims} dimensions");
            return Err(Error::shape("expert tensor", expected, shape)).in_tensor(&entry.name);
        }
    };
    Ok(Piece { tensor, start: 0, rows, cols })
}

/// Checks data types, the shapes of all experts against the first's, and the router's width.
fn check(store: &Store, layer: &LayerTensors) -> Result<()> {
    let float = |tensor: usize| {
        let entry = store.entry(tensor);
        if entry.dtype.is_float()
            || is_index(&entry.name)
            || store.quantised().scheme(tensor).is_some()
        {
            return Ok(());
        }
        let (found, supported) = (entry.dtype.name().into(), FLOATS.into());
        Err(ErrorKind::Unsupported { what: "weight data type", found, supported }.into())
            .in_tensor(&entry.name)
    };
    layer.routing().chain(layer.expert_tensors()).try_for_each(float)?;
    let Some(first) = layer.experts.first() else {
        return Err(Error::malformed(FORMAT, "no experts"));
    };
    let (f, d) = first.last().map_or((0, 0), |down| (down.weight.cols, down.weight.rows));
    for (i, expert) in layer.experts.iter().enumerate() {
        for projection in expert {
            let (rows, cols) = if projection.role == Role::Down { (d, f) } else { (f, d) };
            fits(store, projection.weight, (rows, cols)).in_expert(i)?;
            if let Some(bias) = projection.bias {
                fits(store, bias, (1, rows)).in_expert(i)?;
            }
        }
        let biased = |e: &[Projection]| e.iter().map(|p| p.bias.is_some()).collect::<Vec<_>>();
        if biased(expert) != biased(first) {
            return Err(Error::malformed(FORMAT, "some experts have biases that others lack"))
                .in_expert(i);
        }
    }
    let router = store.entry(layer.router);
    let rows = router.shape.first().copied().unwrap_or(0);
    if router.shape != [rows, d] {
        return Err(Error::shape("router weight", ["N".to_owned(), d.to_string()], &router.shape))
            .in_tensor(&router.name);
    }
    for tensor in [layer.router_bias, layer.correction].into_iter().flatten() {
        let entry = store.entry(tensor);
        if entry.shape != [rows] && entry.shape != [1, rows] {
            return Err(Error::shape("router bias", [rows], &entry.shape)).in_tensor(&entry.name);
        }
    }
    Ok(())
}

fn fits(store: &Store, piece: Piece, expected: (usize, usize)) -> Result<()> {
    if (piece.rows, piece.cols) == expected {
        return Ok(());
    }
    Err(Error::shape("expert projection", expected, (piece.rows, piece.cols)))
        .in_tensor(&store.entry(piece.tensor).name)
        .in_file(store.path(piece.tensor))
}
