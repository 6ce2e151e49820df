//! From tensor names and shapes to MoE layers: which bytes hold which projection of which expert.

use std::collections::{BTreeMap, BTreeSet};

use super::dtype::FLOATS;
use super::json::malformed;
use super::layout::{self, Experts, LAYOUTS, Layout, Part};
use super::store::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{LayerId, Role};

const FORMAT: &str = "MoE layer";

/// A contiguous part of a tensor: a matrix `(rows, cols)`, or a vector with one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Position in the store.
    pub(super) tensor: usize,
    /// First byte, counted in the tensor.
    pub(super) start: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// A projection on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Projection {
    pub(super) role: Role,
    pub(super) weight: Piece,
    pub(super) bias: Option<Piece>,
}

/// The tensors of one MoE layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerTensors {
    pub(super) id: LayerId,
    pub(super) router: usize,
    pub(super) router_bias: Option<usize>,
    pub(super) correction: Option<usize>,
    /// Per expert its projections, gate (if any), up, down.
    pub(super) experts: Vec<Vec<Projection>>,
}

impl LayerTensors {
    /// The tensors besides the experts'.
    pub(super) fn routing(&self) -> impl Iterator<Item = usize> {
        [Some(self.router), self.router_bias, self.correction].into_iter().flatten()
    }

    /// The experts' tensors, each once.
    pub(super) fn expert_tensors(&self) -> BTreeSet<usize> {
        let pieces = self.experts.iter().flatten();
        pieces.flat_map(|p| [Some(p.weight), p.bias]).flatten().map(|p| p.tensor).collect()
    }
}

/// What the names of a checkpoint say.
pub(super) struct Scan {
    pub(super) layout: &'static Layout,
    /// Sorted by layer.
    pub(super) layers: Vec<LayerTensors>,
    /// Tensors of multi-token-prediction layers.
    pub(super) mtp: Vec<usize>,
}

/// An MoE block whose experts have been seen.
struct Block {
    prefix: String,
    layout: &'static Layout,
    parts: Vec<(Part, usize)>,
}

/// Finds the MoE layers. Blocks at or above `hidden_layers` only predict further tokens.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for expert tensors of an unknown layout or data type,
/// [`ErrorKind::Format`] and [`ErrorKind::Shape`] when a layer's tensors do not fit each other.
pub(super) fn scan(store: &Store, hidden_layers: Option<usize>) -> Result<Scan> {
    let mut blocks: BTreeMap<LayerId, Block> = BTreeMap::new();
    let (mut mtp, mut routers) = (Vec::new(), Vec::new());
    for (tensor, entry) in store.tensors().iter().map(|t| &t.entry).enumerate() {
        let site = layout::site(&entry.name);
        if is_mtp(&entry.name, site.map(|(id, ..)| id), hidden_layers) {
            mtp.push(tensor);
            continue;
        }
        let part = site.and_then(|(id, at, rest)| {
            let read = |l: &'static Layout| Some((id, at, l, l.part(rest)?));
            LAYOUTS.iter().find_map(read)
        });
        match (part, site) {
            (Some((id, at, layout, part)), _) => {
                let prefix = &entry.name[..at];
                insert(&mut blocks, id, prefix, layout, (part, tensor)).in_tensor(&entry.name)?;
            }
            (None, _) if layout::looks_like_experts(&entry.name) => {
                return Err(unsupported(&entry.name))
                    .in_tensor(&entry.name)
                    .in_file(store.path(tensor));
            }
            (None, Some((id, _, rest))) if is_router(rest) => routers.push((id, tensor)),
            (None, _) => {}
        }
    }
    if let Some((id, tensor)) = routers.iter().find(|(id, _)| !blocks.contains_key(id)) {
        return Err(malformed(FORMAT, "a router without experts"))
            .in_tensor(&store.entry(*tensor).name)
            .in_layer(id);
    }
    let Some(layout) = blocks.values().next().map(|b| b.layout) else {
        return Err(unsupported("no expert tensors"));
    };
    let mut layers = Vec::with_capacity(blocks.len());
    for (id, block) in &blocks {
        if !std::ptr::eq(block.layout, layout) {
            let found = format!("{} beside {}", block.layout.name, layout.name);
            return Err(unsupported(&found)).in_layer(id);
        }
        layers.push(layer(store, *id, block).in_layer(id)?);
    }
    Ok(Scan { layout, layers, mtp })
}

fn is_mtp(name: &str, id: Option<LayerId>, hidden_layers: Option<usize>) -> bool {
    let beyond = |id: LayerId| {
        id.stack == crate::model::Stack::Causal && hidden_layers.is_some_and(|n| id.index >= n)
    };
    // A vision tower may be deeper than the language model.
    let text = !name.contains("vision") && !name.contains("visual") && !name.contains("audio");
    name.starts_with("mtp.") || name.contains(".mtp.") || (text && id.is_some_and(beyond))
}

fn is_router(rest: &str) -> bool {
    LAYOUTS.iter().any(|l| l.router.contains(&rest))
}

fn unsupported(found: &str) -> Error {
    let (found, supported) = (found.to_owned(), layout::supported());
    ErrorKind::Unsupported { what: "expert layout", found, supported }.into()
}

fn insert(
    blocks: &mut BTreeMap<LayerId, Block>,
    id: LayerId,
    prefix: &str,
    layout: &'static Layout,
    part: (Part, usize),
) -> Result<()> {
    let block = blocks.entry(id).or_insert_with(|| Block {
        prefix: prefix.to_owned(),
        layout,
        parts: Vec::new(),
    });
    if block.prefix != prefix || !std::ptr::eq(block.layout, layout) {
        let reason = format!(
            "two sets of experts: {} ({}) and {prefix} ({})",
            block.prefix, block.layout.name, layout.name
        );
        return Err(malformed(FORMAT, reason)).in_layer(id);
    }
    block.parts.push(part);
    Ok(())
}

fn layer(store: &Store, id: LayerId, block: &Block) -> Result<LayerTensors> {
    let named = |names: &[&str]| {
        names.iter().find_map(|name| store.get(&format!("{}{name}", block.prefix)))
    };
    let router = named(block.layout.router).ok_or_else(|| {
        let names = block.layout.router.join(" or ");
        malformed(FORMAT, format!("no router: expected {}{names}", block.prefix))
    })?;
    let experts = match block.layout.experts {
        Experts::Each { .. } => each(store, block)?,
        Experts::Fused { .. } => fused(store, block, router)?,
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

/// The experts of a layout with tensors of their own: `0..N`, each complete.
fn each(store: &Store, block: &Block) -> Result<Vec<Vec<Projection>>> {
    let mut found: BTreeMap<(usize, Role), (Option<usize>, Option<usize>)> = BTreeMap::new();
    for &(part, tensor) in &block.parts {
        match part {
            Part::Weight(i, role) => found.entry((i, role)).or_default().0 = Some(tensor),
            Part::Bias(i, role) => found.entry((i, role)).or_default().1 = Some(tensor),
            Part::FusedGateUp | Part::FusedDown => {}
        }
    }
    let gated = block.layout.is_gated();
    let roles = [Role::Gate, Role::Up, Role::Down].into_iter().skip(usize::from(!gated));
    let count = found.keys().map(|(i, _)| i + 1).max().unwrap_or(0);
    let present: BTreeSet<usize> = found.keys().map(|(i, _)| *i).collect();
    if let Some(missing) = (0..count).take(present.len() + 1).find(|i| !present.contains(i)) {
        let reason = format!("expert {missing} is missing of 0..{count}");
        return Err(malformed(FORMAT, reason)).in_expert(missing);
    }
    let expert = |i: usize| {
        let projection = |role| {
            let (weight, bias) = found.get(&(i, role)).copied().unwrap_or_default();
            let weight = weight.ok_or_else(|| {
                let reason = format!("expert {i} has no {role} projection");
                malformed(FORMAT, reason)
            })?;
            let weight = whole(store, weight, 2)?;
            let bias = bias.map(|b| whole(store, b, 1)).transpose()?;
            Ok(Projection { role, weight, bias })
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

/// The experts of a fused layout: slices of `(N, 2f, d)` and `(N, d, f)`.
fn fused(store: &Store, block: &Block, router: usize) -> Result<Vec<Vec<Projection>>> {
    let find = |wanted: Part| block.parts.iter().find(|(p, _)| *p == wanted).map(|(_, t)| *t);
    let (Some(gate_up), Some(down)) = (find(Part::FusedGateUp), find(Part::FusedDown)) else {
        return Err(malformed(FORMAT, "one of the two fused expert tensors is missing"));
    };
    let (first, second) = (store.entry(gate_up), store.entry(down));
    let d = store.entry(router).shape.get(1).copied().unwrap_or(0);
    let &[n, d_out, f] = &second.shape[..] else {
        return Err(Error::shape("fused down projection", "[N, d, f]", &second.shape))
            .in_tensor(&second.name);
    };
    if d_out != d && f == d {
        let found = format!("transposed experts: {:?} and {:?}", first.shape, second.shape);
        return Err(unsupported(&found)).in_tensor(&first.name);
    }
    if d_out != d {
        return Err(Error::shape("fused down projection", [n, d, f], &second.shape))
            .in_tensor(&second.name);
    }
    if first.shape != [n, 2 * f, d] {
        return Err(Error::shape("fused gate and up projection", [n, 2 * f, d], &first.shape))
            .in_tensor(&first.name);
    }
    let piece = |tensor: usize, index: usize, rows: usize, cols: usize| {
        let size = store.entry(tensor).dtype.alignment();
        Piece { tensor, start: index * rows * cols * size, rows, cols }
    };
    let expert = |i: usize| {
        let part = |role, weight| Projection { role, weight, bias: None };
        vec![
            part(Role::Gate, piece(gate_up, 2 * i, f, d)),
            part(Role::Up, piece(gate_up, 2 * i + 1, f, d)),
            part(Role::Down, piece(down, i, d, f)),
        ]
    };
    Ok((0..n).map(expert).collect())
}

/// Checks data types, the shapes of all experts against the first's, and the router's width.
fn check(store: &Store, layer: &LayerTensors) -> Result<()> {
    let float = |tensor: usize| {
        let entry = store.entry(tensor);
        if entry.dtype.is_float() {
            return Ok(());
        }
        let (found, supported) = (entry.dtype.name().into(), FLOATS.into());
        Err(ErrorKind::Unsupported { what: "weight data type", found, supported }.into())
            .in_tensor(&entry.name)
    };
    layer.routing().chain(layer.expert_tensors()).try_for_each(float)?;
    let Some(first) = layer.experts.first() else {
        return Err(malformed(FORMAT, "no experts"));
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
            return Err(malformed(FORMAT, "some experts have biases that others lack"))
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
