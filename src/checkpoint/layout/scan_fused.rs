//! Experts that share tensors: which part of them is whose.

use super::names::Part;
use super::scan::{Block, FORMAT};
use super::scan_layer::{Order, Piece, Projection};
use crate::checkpoint::quant::{Scheme, mxfp4};
use crate::checkpoint::read::Store;
use crate::error::{Error, Locate, Result};
use crate::model::Role;

/// The experts of a fused layout: slices of `(N, 2f, d)` and `(N, d, f)`, or of their transposes.
pub(crate) fn fused(store: &Store, block: &Block, router: usize) -> Result<Vec<Vec<Projection>>> {
    let find = |wanted: Part| block.parts.iter().find(|(p, _)| *p == wanted).map(|(_, t)| *t);
    let (Some(gate_up), Some(down)) = (find(Part::FusedGateUp), find(Part::FusedDown)) else {
        return Err(Error::malformed(FORMAT, "one of the two fused expert tensors is missing"));
    };
    let (first, second) = (store.entry(gate_up), store.entry(down));
    let d = store.entry(router).shape.get(1).copied().unwrap_or(0);
    let &[n, rows, cols] = &second.shape[..] else {
        return Err(Error::shape("fused down projection", "[N, d, f]", &second.shape))
            .in_tensor(&second.name);
    };
    check_sizes(store, down, [n, rows, cols])?;
    let transposed = cols == d && first.shape == [n, d, rows.saturating_mul(2)];
    let f = if transposed { rows } else { cols };
    if !transposed && rows != d {
        return Err(Error::shape("fused down projection", [n, d, f], &second.shape))
            .in_tensor(&second.name);
    }
    let expected = [n, f.saturating_mul(2), d];
    if !transposed && first.shape != expected {
        return Err(Error::shape("fused gate and up projection", expected, &first.shape))
            .in_tensor(&first.name);
    }
    let part = |role, tensor: usize, index: usize, (rows, cols), order| {
        let size = store.entry(tensor).dtype.alignment();
        let weight = Piece { tensor, start: index * f * d * size, rows, cols };
        Projection { role, weight, bias: None, order, factors: None }
    };
    let expert = |i: usize| {
        if !transposed {
            return vec![
                part(Role::Gate, gate_up, 2 * i, (f, d), Order::PLAIN),
                part(Role::Up, gate_up, 2 * i + 1, (f, d), Order::PLAIN),
                part(Role::Down, down, i, (d, f), Order::PLAIN),
            ];
        }
        let half = |first| Order { first, step: 1, parts: 2, transposed };
        vec![
            part(Role::Gate, gate_up, 2 * i, (f, d), half(0)),
            part(Role::Up, gate_up, 2 * i, (f, d), half(f)),
            part(Role::Down, down, i, (d, f), Order { transposed, ..Order::PLAIN }),
        ]
    };
    Ok((0..n).map(expert).collect())
}

/// The experts of a flat layout: `(N f, d)`, down transposed; `merged` of them, else as many as
/// router rows.
pub(crate) fn flat(
    store: &Store,
    block: &Block,
    router: usize,
    merged: Option<usize>,
) -> Result<Vec<Vec<Projection>>> {
    let &[rows, d] = &store.entry(router).shape[..] else {
        return Err(Error::shape("router weight", "[N, d]", &store.entry(router).shape));
    };
    let n = merged.unwrap_or(rows);
    let find = |role: Role| {
        let mut parts = block.parts.iter().filter(|(part, _)| *part == Part::Flat(role));
        let missing = || Error::malformed(FORMAT, format!("there is no {role} projection"));
        let &(_, tensor) = parts.next().ok_or_else(missing)?;
        let entry = store.entry(tensor);
        match entry.shape[..] {
            [rows, cols] if cols == d && n > 0 && rows.is_multiple_of(n) => Ok((tensor, rows / n)),
            _ => Err(Error::shape("flat expert tensor", format!("[{n} f, {d}]"), &entry.shape))
                .in_tensor(&entry.name),
        }
    };
    let found = [find(Role::Gate)?, find(Role::Up)?, find(Role::Down)?];
    for (tensor, f) in found {
        check_sizes(store, tensor, [n, f, d])?;
    }
    let expert = |i: usize| {
        let part = |(role, (tensor, f)): (Role, (usize, usize))| {
            let start = i * f * d * store.entry(tensor).dtype.alignment();
            let (order, rows, cols) = match role {
                Role::Down => (Order { transposed: true, ..Order::PLAIN }, d, f),
                _ => (Order::PLAIN, f, d),
            };
            let weight = Piece { tensor, start, rows, cols };
            Projection { role, weight, bias: None, order, factors: None }
        };
        [Role::Gate, Role::Up, Role::Down].into_iter().zip(found).map(part).collect()
    };
    Ok((0..n).map(expert).collect())
}

/// The experts of an interleaved layout, transposed or in MXFP4.
pub(crate) fn interleaved(store: &Store, block: &Block) -> Result<Vec<Vec<Projection>>> {
    let find = |wanted: Part| {
        let mut found = block.parts.iter().filter(|(part, _)| *part == wanted).map(|(_, t)| *t);
        match (found.next(), found.next()) {
            (first, None) => Ok(first),
            (_, Some(second)) => Err(Error::malformed(FORMAT, "it repeats another tensor"))
                .in_tensor(&store.entry(second).name),
        }
    };
    let (Some(gate_up), Some(down)) = (find(Part::FusedGateUp)?, find(Part::FusedDown)?) else {
        return Err(Error::malformed(FORMAT, "one of the two fused expert tensors is missing"));
    };
    let (n, d, f) = dims(store, down)?;
    check_sizes(store, down, [n, d, f])?;
    let expected = (n, f.saturating_mul(2), d);
    let found = dims(store, gate_up)?;
    if found != expected {
        return Err(Error::shape("fused gate and up projection, [N, 2f, d]", expected, found))
            .in_tensor(&store.entry(gate_up).name);
    }
    let bias = |part: Part, width: usize| {
        let Some(tensor) = find(part)? else { return Ok(None) };
        let entry = store.entry(tensor);
        if entry.shape != [n, width] {
            return Err(Error::shape("fused bias", [n, width], &entry.shape))
                .in_tensor(&entry.name);
        }
        Ok(Some(tensor))
    };
    let gate_up_bias = bias(Part::FusedGateUpBias, 2 * f)?;
    let down_bias = bias(Part::FusedDownBias, d)?;
    let part = |tensor: usize, i: usize, rows: usize, cols: usize| {
        let slab = store.bytes(tensor).len() / n.max(1);
        Piece { tensor, start: i * slab, rows, cols }
    };
    let expert = |i: usize| {
        let projection = |role, weight, bias: Option<usize>, rows, cols, first, parts| {
            let transposed = store.quantised().scheme(weight).is_none();
            let order = Order { first, step: parts, parts, transposed };
            let bias = bias.map(|bias| part(bias, i, 1, rows));
            Projection { role, weight: part(weight, i, rows, cols), bias, order, factors: None }
        };
        vec![
            projection(Role::Gate, gate_up, gate_up_bias, f, d, 0, 2),
            projection(Role::Up, gate_up, gate_up_bias, f, d, 1, 2),
            projection(Role::Down, down, down_bias, d, f, 0, 1),
        ]
    };
    Ok((0..n).map(expert).collect())
}

/// Most experts of a layer. Without data a header could name any number, and each takes memory.
const MAX_EXPERTS: usize = 8192;

/// Refuses `[N, ..]` where a side is 0: it holds no bytes, so that no file size bounds the others.
fn check_sizes(store: &Store, tensor: usize, sizes: [usize; 3]) -> Result<()> {
    let [n, first, second] = sizes;
    if n > 0 && n <= MAX_EXPERTS && first > 0 && second > 0 {
        return Ok(());
    }
    let entry = store.entry(tensor);
    let expected = format!("1 to {MAX_EXPERTS} experts, no side of 0");
    Err(Error::shape("experts that share a tensor", expected, &entry.shape)).in_tensor(&entry.name)
}

/// Experts, outputs and inputs of a tensor of an interleaved layout.
fn dims(store: &Store, tensor: usize) -> Result<(usize, usize, usize)> {
    let entry = store.entry(tensor);
    match (store.quantised().scheme(tensor), &entry.shape[..]) {
        (Some(Scheme::Mxfp4 { .. }), &[n, outputs, groups, _]) => {
            Ok((n, outputs, groups.saturating_mul(mxfp4::VALUES)))
        }
        (None, &[n, inputs, outputs]) => Ok((n, outputs, inputs)),
        (_, shape) => {
            Err(Error::shape("fused expert tensor", "[N, in, out] or MXFP4 groups", shape))
                .in_tensor(&entry.name)
        }
    }
}
