//! Everything about the target that is known before a layer is merged: which tensors it has, in
//! which files, and where.

use std::collections::{BTreeMap, HashMap};

use super::check::check;
use super::dequantise;
use super::dequantise::Plain;
use super::request::{Export, WritePlan};
use crate::checkpoint::layout::{
    Factor, Factoring, Factors, LayerTensors, Order, Piece, Projection, kept_shape,
};
use crate::checkpoint::read::{Checkpoint, Store};
use crate::error::Result;
use crate::model::{Grouping, LayerId, Role, Structure};
use crate::stage::RankBudget;
use crate::tensor_file::{Dtype, NewTensor, encode_header};

/// A tensor of the target.
pub(super) struct Out {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: usize,
    /// The source's tensor that it copies; `None` for a tensor of a merged layer.
    pub(super) copies: Option<usize>,
    pub(super) file: usize,
    /// Its first byte in the file.
    pub(super) at: u64,
}

/// A file of the target.
pub(super) struct OutFile {
    pub(super) name: String,
    pub(super) header: Vec<u8>,
    pub(super) size: u64,
}

/// The target's tensors.
pub(super) struct Plan {
    /// Sorted by file and place.
    pub(super) outs: Vec<Out>,
    pub(super) files: Vec<OutFile>,
    /// The planned layers, with positions in `outs`.
    pub(super) layers: BTreeMap<LayerId, LayerTensors>,
    /// What the source has and the target has not, and why.
    pub(super) dropped: Vec<(String, String)>,
    /// The stock export's number of experts.
    pub(super) experts: Option<usize>,
}

impl Plan {
    /// Checks `plan` against `source` and lays the target out.
    pub(super) fn new(source: &Checkpoint, plan: &WritePlan) -> Result<Self> {
        let experts = check(source, plan)?;
        let mut dropped = Vec::new();
        let mut draft = Draft { outs: Vec::new(), layers: BTreeMap::new() };
        let mut owner: HashMap<usize, (&LayerTensors, &Grouping)> = HashMap::new();
        for layer in &source.tensors {
            let Some(grouping) = plan.groupings.get(&layer.id) else { continue };
            if plan.only.as_ref().is_some_and(|only| !only.contains(&layer.id)) {
                continue;
            }
            for tensor in layer.routing().chain(layer.expert_tensors()) {
                owner.insert(tensor, (layer, grouping));
            }
        }
        let drops_mtp = plan.drops_mtp();
        for (tensor, found) in source.store.tensors().iter().enumerate() {
            let store = &source.store;
            if plan.only.is_some() && !owner.contains_key(&tensor) {
                continue;
            }
            if drops_mtp && source.mtp.binary_search(&tensor).is_ok() {
                let reason = "multi-token prediction was trained with the unmerged experts";
                dropped.push((found.entry.name.clone(), reason.to_owned()));
            } else if let Some((layer, grouping)) = owner.get(&tensor) {
                let factoring = plan.factored.get(&layer.id);
                let factoring = factoring.filter(|_| plan.export == Export::Native);
                draft.layer(source, layer, grouping, plan, factoring);
            } else if let Some(weight) = store.quantised().scaled(tensor) {
                let reason = format!("{} is written dequantised", store.entry(weight).name);
                dropped.push((found.entry.name.clone(), reason));
            } else {
                let Plain { name, dtype, shape } = dequantise::plain(store, tensor);
                draft.push(name, dtype, shape, Some(tensor));
            }
        }
        let (outs, files, layers) = draft.place(plan.shard_bytes);
        Ok(Self { outs, files, layers, dropped, experts })
    }
}

/// The target's tensors in the order of the source, not yet in files.
struct Draft {
    outs: Vec<Out>,
    layers: BTreeMap<LayerId, LayerTensors>,
}

impl Draft {
    fn push(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: Vec<usize>,
        copies: Option<usize>,
    ) -> usize {
        // The shape is one of the source, or smaller, so that its size cannot overflow.
        let bytes = dtype.bytes(&shape).unwrap_or(0);
        let out = Out { name: name.to_owned(), dtype, shape, bytes, copies, file: 0, at: 0 };
        self.outs.push(out);
        self.outs.len() - 1
    }

    /// All tensors of a planned layer, the first time one of them is met.
    fn layer(
        &mut self,
        source: &Checkpoint,
        layer: &LayerTensors,
        grouping: &Grouping,
        &WritePlan { export, d_ff, .. }: &WritePlan,
        factoring: Option<&Factoring>,
    ) {
        if self.layers.contains_key(&layer.id) {
            return;
        }
        let (n, m) = (grouping.experts(), grouping.groups());
        let (rows, slots) = match export {
            Export::Stock => (m, m),
            Export::Native => (n, m),
            Export::Expanded => (n, n),
        };
        let mut routing = |tensor: usize, axis: usize| {
            let Plain { name, dtype, mut shape } = dequantise::plain(&source.store, tensor);
            if let Some(side) = shape.get_mut(axis) {
                *side = rows;
            }
            self.push(name, dtype, shape, None)
        };
        let last = |tensor: usize| source.store.entry(tensor).shape.len() - 1;
        let router = routing(layer.router, 0);
        let router_bias = layer.router_bias.map(|t| routing(t, last(t)));
        let correction = layer.correction.map(|t| routing(t, last(t)));
        let mut fused: HashMap<usize, usize> = HashMap::new();
        let store = &source.store;
        let types = dequantise::merged_types(store, layer);
        // Where every expert stays, each keeps its type.
        let own = |piece: Piece| dequantise::plain(store, piece.tensor).dtype;
        let experts = (0..slots).map(|slot| {
            let projections = layer.experts[slot].iter().enumerate();
            projections
                .map(|(at, named)| {
                    let [mut weight_type, mut bias_type] = types[at];
                    if n == m {
                        weight_type = own(named.weight);
                        bias_type = named.bias.map_or(bias_type, own);
                    }
                    let factoring = factoring.filter(|_| source.own_tensors(named));
                    if let Some(kept) = factoring.and_then(|f| f.of(slot, at)) {
                        return self.factored(store, named, [weight_type, bias_type], kept);
                    }
                    let order = dequantise::order(&source.store, named);
                    let mut piece = |named: Piece, dtype: Dtype, order: Order| {
                        let Plain { name, mut shape, .. } = dequantise::plain(store, named.tensor);
                        let tensor = *fused.entry(named.tensor).or_insert_with(|| {
                            // Experts that share a tensor have even bands of its first axis.
                            let shared = order.slab(named).cols != shape.iter().product::<usize>();
                            if shared {
                                shape[0] = shape[0] / layer.experts.len().max(1) * slots;
                            }
                            self.push(name, dtype, shape, None)
                        });
                        let start = store.values(named.tensor, named.start) * dtype.alignment();
                        Piece { tensor, start, ..named }
                    };
                    let mut weight = piece(named.weight, weight_type, order);
                    let mut bias = named.bias.map(|bias| piece(bias, bias_type, order.upright()));
                    if let Some(d_ff) = d_ff {
                        self.narrow(named.role, &mut weight, bias.as_mut(), d_ff);
                    }
                    Projection { role: named.role, weight, bias, order, factors: None }
                })
                .collect()
        });
        let experts = experts.collect();
        let id = layer.id;
        self.layers.insert(id, LayerTensors { id, router, router_bias, correction, experts });
    }

    /// Leaves `d_ff` hidden units to a projection with tensors of its own.
    fn narrow(&mut self, role: Role, weight: &mut Piece, bias: Option<&mut Piece>, d_ff: usize) {
        let mut cut = |piece: &mut Piece, axis: usize| {
            let side = if axis == 0 { &mut piece.rows } else { &mut piece.cols };
            *side = d_ff;
            let out = &mut self.outs[piece.tensor];
            let last = out.shape.len().saturating_sub(1);
            if let Some(side) = out.shape.get_mut(axis.min(last)) {
                *side = d_ff;
            }
            out.bytes = out.dtype.bytes(&out.shape).unwrap_or(0);
        };
        match role {
            Role::Down => cut(weight, 1),
            Role::Gate | Role::Up => {
                cut(weight, 0);
                if let Some(bias) = bias {
                    cut(bias, 1);
                }
            }
        }
    }

    /// The tensors of a projection in factors.
    fn factored(
        &mut self,
        store: &Store,
        named: &Projection,
        [dtype, bias_type]: [Dtype; 2],
        (RankBudget { rank, rows }, structure): (RankBudget, Structure),
    ) -> Projection {
        let name = dequantise::plain(store, named.weight.tensor).name;
        let (m, n) = (named.weight.rows, named.weight.cols);
        let mut push = |factor: Factor, shape: Vec<usize>, dtype: Dtype| {
            let piece = match shape[..] {
                [rows, cols] => Piece { tensor: 0, start: 0, rows, cols },
                _ => Piece { tensor: 0, start: 0, rows: 1, cols: shape.iter().product() },
            };
            let name = format!("{name}.{}", factor.suffix());
            Piece { tensor: self.push(&name, dtype, shape, None), ..piece }
        };
        let left = push(Factor::Left, vec![m, rank], dtype);
        let right = push(Factor::Right, vec![rank, n], dtype);
        let [lines, index] = Factor::of(structure);
        let shape = kept_shape(structure, (m, n), rows);
        let lines = push(lines, vec![shape.0, shape.1], dtype);
        let index = push(index, vec![rows], Dtype::I32);
        let factors = Some(Factors { left, right, structure, lines, index });
        let bias = named.bias.map(|bias| {
            let Plain { name, shape, .. } = dequantise::plain(store, bias.tensor);
            Piece { tensor: self.push(name, bias_type, shape, None), ..bias }
        });
        let weight = Piece { cols: n, ..left };
        Projection { role: named.role, weight, bias, order: Order::PLAIN, factors }
    }

    /// Cuts the tensors into files and sorts each file's by alignment, widest first, as readers
    /// that view the data in place need it.
    fn place(
        mut self,
        shard_bytes: u64,
    ) -> (Vec<Out>, Vec<OutFile>, BTreeMap<LayerId, LayerTensors>) {
        let (mut file, mut filled) = (0, 0u64);
        for out in &mut self.outs {
            if filled > 0 && filled + out.bytes as u64 > shard_bytes {
                (file, filled) = (file + 1, 0);
            }
            out.file = file;
            filled += out.bytes as u64;
        }
        let mut order: Vec<usize> = (0..self.outs.len()).collect();
        let outs = &self.outs;
        order.sort_by_key(|&i| (outs[i].file, std::cmp::Reverse(outs[i].dtype.alignment()), i));
        let mut rank = vec![0; order.len()];
        order.iter().enumerate().for_each(|(to, &from)| rank[from] = to);
        let mut outs: Vec<Option<Out>> = self.outs.into_iter().map(Some).collect();
        let mut outs: Vec<Out> = order.iter().filter_map(|&i| outs[i].take()).collect();
        for layer in self.layers.values_mut() {
            renumber(layer, &rank);
        }
        let count = file + 1;
        let files = (0..count).map(|file| {
            let start = outs.partition_point(|o| o.file < file);
            let end = outs.partition_point(|o| o.file <= file);
            let name = match count {
                1 => crate::checkpoint::read::shards::SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", file + 1),
            };
            lay_out(name, &mut outs[start..end])
        });
        let files = files.collect();
        (outs, files, self.layers)
    }
}

fn renumber(layer: &mut LayerTensors, rank: &[usize]) {
    layer.router = rank[layer.router];
    for tensor in [&mut layer.router_bias, &mut layer.correction].into_iter().flatten() {
        *tensor = rank[*tensor];
    }
    for projection in layer.experts.iter_mut().flatten() {
        projection.weight.tensor = rank[projection.weight.tensor];
        if let Some(Factors { left, right, lines, index, .. }) = &mut projection.factors {
            [left, right, lines, index].into_iter().for_each(|p| p.tensor = rank[p.tensor]);
        }
        if let Some(bias) = &mut projection.bias {
            bias.tensor = rank[bias.tensor];
        }
    }
}

/// Gives the tensors of a file their places and makes its header.
fn lay_out(name: String, outs: &mut [Out]) -> OutFile {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let tensors = outs.iter().map(|out| NewTensor {
        name: &out.name,
        dtype: out.dtype.name(),
        shape: &out.shape,
        bytes: out.bytes as u64,
    });
    let header = encode_header(&metadata, tensors);
    let mut end = header.len() as u64;
    for out in outs {
        (out.at, end) = (end, end + out.bytes as u64);
    }
    OutFile { name, header, size: end }
}
