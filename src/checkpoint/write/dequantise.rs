//! The target's tensors for a quantised source: every weight as bf16, without scales.

use super::writer::Writer;
use crate::checkpoint::layout::{LayerTensors, Order, Piece, Projection};
use crate::checkpoint::quant::{Scheme, mxfp4};
use crate::checkpoint::read::{Store, weights};
use crate::error::{Locate, Result};
use crate::tensor_file::Dtype;

/// How a tensor of the source is called and stored in the target.
pub(super) struct Plain<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

/// A tensor as it is, or a quantised one as bf16: MXFP4 transposed, as runtimes expect it then.
pub(super) fn plain(store: &Store, tensor: usize) -> Plain<'_> {
    let entry = store.entry(tensor);
    let (name, shape) = (&*entry.name, entry.shape.clone());
    match (store.quantised().scheme(tensor), &shape[..]) {
        (None, _) => Plain { name, dtype: entry.dtype, shape },
        (Some(Scheme::Mxfp4 { .. }), [stack @ .., rows, groups, _]) => {
            let shape = [stack, &[groups * mxfp4::VALUES, *rows]].concat();
            let name = name.strip_suffix("_blocks").unwrap_or(name);
            Plain { name, dtype: Dtype::BF16, shape }
        }
        (Some(_), _) => Plain { name, dtype: Dtype::BF16, shape },
    }
}

/// The element types of a merged layer's projections in the target, weight and bias each: those of
/// the source's experts, or F32, which holds them all exactly, where they differ. They do not
/// depend on the groups, which may be known later than the place of every tensor.
pub(super) fn merged_types(store: &Store, layer: &LayerTensors) -> Vec<[Dtype; 2]> {
    let common = |at: usize, part: fn(&Projection) -> Option<Piece>| {
        let pieces = layer.experts.iter().filter_map(|expert| part(expert.get(at)?));
        let mut types = pieces.map(|piece| plain(store, piece.tensor).dtype);
        let first = types.next().unwrap_or(Dtype::F32);
        if types.all(|other| other == first) { first } else { Dtype::F32 }
    };
    let projections = layer.experts.first().map_or(0, Vec::len);
    (0..projections).map(|at| [common(at, |p| Some(p.weight)), common(at, |p| p.bias)]).collect()
}

/// Where a projection of the source lies in the target.
pub(super) fn order(store: &Store, source: &Projection) -> Order {
    match store.quantised().scheme(source.weight.tensor) {
        Some(Scheme::Mxfp4 { .. }) => Order { transposed: true, ..source.order },
        _ => source.order,
    }
}

/// Values converted at a time.
const CHUNK: usize = 4 << 20;

impl Writer<'_> {
    /// Writes a quantised tensor of the source, `original`, as bf16.
    pub(super) fn dequantise(&mut self, tensor: usize, original: usize) -> Result<()> {
        let source = self.source;
        let store = &source.store;
        let count = store.parameters(original);
        let stacked = match (store.quantised().scheme(original), &self.plan.outs[tensor].shape[..])
        {
            (Some(Scheme::Mxfp4 { .. }), &[.., cols, rows]) => Some((rows, cols)),
            _ => None,
        };
        let step = stacked.map_or(CHUNK, |(rows, cols)| rows * cols).max(1);
        let order = Order { transposed: true, ..Order::PLAIN };
        for start in (0..count).step_by(step) {
            // Two of a stack's values share a byte.
            let at = if stacked.is_some() { start / 2 } else { start };
            let cols = step.min(count - start);
            let read =
                weights::values(store, Piece { tensor: original, start: at, rows: 1, cols })?;
            let values = match stacked {
                None => read,
                Some(shape) => {
                    let mut turned = vec![0.0; read.len()];
                    order.walk(shape, |from, to| turned[to] = read[from]);
                    turned
                }
            };
            let mut out = Vec::with_capacity(2 * values.len());
            Dtype::BF16
                .encode(&values, &mut out)
                .in_tensor(&store.entry(original).name)
                .in_file(store.path(original))?;
            self.put_bytes(tensor, 2 * start, &out)?;
        }
        let whole = store.with_scales(original);
        whole.for_each(|t| store.release(t, 0..store.bytes(t).len()));
        Ok(())
    }
}
