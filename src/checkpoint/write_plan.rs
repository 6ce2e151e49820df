//! Everything about the target that is known before a layer is merged: which tensors it has, in
//! which files and where, and that the runtimes meant to load it can.

use std::collections::{BTreeMap, HashMap};

use serde_json::json;

use super::dtype::Dtype;
use super::open::Checkpoint;
use super::scan::{LayerTensors, Piece, Projection};
use super::write::{Export, WritePlan};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Grouping, LayerId, RoutingRule};

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
    /// The routing rule of narrowed routers.
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
            for tensor in layer.routing().chain(layer.expert_tensors()) {
                owner.insert(tensor, (layer, grouping));
            }
        }
        let drops_mtp = drops_mtp(plan);
        for (tensor, found) in source.store.tensors().iter().enumerate() {
            if drops_mtp && source.mtp.binary_search(&tensor).is_ok() {
                let reason = "multi-token prediction was trained with the unmerged experts";
                dropped.push((found.entry.name.clone(), reason.to_owned()));
            } else if let Some((layer, grouping)) = owner.get(&tensor) {
                draft.layer(source, layer, grouping, plan.export);
            } else {
                let entry = &found.entry;
                draft.push(&entry.name, entry.dtype, entry.shape.clone(), Some(tensor));
            }
        }
        let (outs, files, layers) = draft.place(plan.shard_bytes);
        Ok(Self { outs, files, layers, dropped, experts })
    }
}

/// Whether multi-token-prediction layers are left out.
pub(super) fn drops_mtp(plan: &WritePlan) -> bool {
    plan.export != Export::Expanded && plan.groupings.values().any(|g| !g.is_identity())
}

/// The rule of a layer's router in the target.
pub(super) fn target_rule(rule: RoutingRule, plan: &WritePlan) -> RoutingRule {
    let groups = if plan.flatten_groups { None } else { rule.groups };
    RoutingRule { top_k: plan.top_k.unwrap_or(rule.top_k), groups, ..rule }
}

/// Refuses what could not be loaded; the stock export's number of experts.
fn check(source: &Checkpoint, plan: &WritePlan) -> Result<Option<usize>> {
    let unsupported = |what, found: &str, supported: &str| -> Error {
        ErrorKind::Unsupported { what, found: found.into(), supported: supported.into() }.into()
    };
    if source.is_native() {
        let supported = "the original checkpoint";
        return Err(unsupported("source of a merge", "a native folder", supported));
    }
    if source.config().get("quantization_config").is_some() {
        return Err(unsupported("source of a merge", "a quantised model", super::dtype::FLOATS));
    }
    if plan.export == Export::Expanded && (plan.top_k.is_some() || plan.flatten_groups) {
        let reason = "the expanded export leaves the router and its config as they are".into();
        return Err(ErrorKind::Recipe { reason }.into());
    }
    if plan.export != Export::Stock && plan.flatten_groups {
        let reason = "only the stock export flattens routing groups".into();
        return Err(ErrorKind::Recipe { reason }.into());
    }
    for (id, grouping) in &plan.groupings {
        let experts = source.layer(*id)?.experts;
        if grouping.experts() != experts {
            return Err(Error::shape("grouping", experts, grouping.experts())).in_layer(id);
        }
        if plan.export == Export::Expanded && grouping.labels().contains(&None) {
            let found = "dropped experts, whose router rows would still choose them";
            return Err(unsupported("expanded export", found, "merged experts")).in_layer(id);
        }
    }
    for layer in source.layers() {
        let k = plan.top_k.unwrap_or(layer.rule.top_k);
        if k == 0 || k > layer.rule.top_k {
            let expected = format!("1..={}", layer.rule.top_k);
            return Err(Error::range("experts per token (top-k)", expected, k)).in_layer(layer.id);
        }
    }
    if plan.export == Export::Stock { uniform(source, plan).map(Some) } else { Ok(None) }
}

/// The number of experts of a stock export, the same in every layer and enough to route.
fn uniform(source: &Checkpoint, plan: &WritePlan) -> Result<usize> {
    let mut first: Option<(LayerId, usize)> = None;
    for layer in source.layers() {
        let m = plan.groupings.get(&layer.id).map_or(layer.experts, Grouping::groups);
        let (other, expected) = *first.get_or_insert((layer.id, m));
        if m != expected {
            let reason = format!(
                "the stock export needs one number of experts in every layer, but {other} keeps \
                 {expected} and {} keeps {m}",
                layer.id
            );
            return Err(ErrorKind::Budget { reason }.into());
        }
        let rule = target_rule(layer.rule, plan);
        if rule.top_k > m {
            return Err(Error::range("experts per token (top-k)", format!("1..={m}"), rule.top_k))
                .in_layer(layer.id);
        }
        if let Some(misfit) = rule.groups.and_then(|g| g.misfit(m, rule.top_k)) {
            return Err(Error::range("routing groups", "an even split", misfit)).in_layer(layer.id);
        }
    }
    Ok(first.map_or(0, |(_, m)| m))
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
        export: Export,
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
            let entry = source.store.entry(tensor);
            let mut shape = entry.shape.clone();
            if let Some(side) = shape.get_mut(axis) {
                *side = rows;
            }
            self.push(&entry.name, entry.dtype, shape, None)
        };
        let last = |tensor: usize| source.store.entry(tensor).shape.len() - 1;
        let router = routing(layer.router, 0);
        let router_bias = layer.router_bias.map(|t| routing(t, last(t)));
        let correction = layer.correction.map(|t| routing(t, last(t)));
        let mut fused: HashMap<usize, usize> = HashMap::new();
        let experts = (0..slots).map(|slot| {
            let group =
                if export == Export::Expanded { grouping.labels()[slot] } else { Some(slot) };
            let dominant = group.map_or(slot, |g| grouping.dominants()[g]);
            let like = layer.experts[slot].iter().zip(&layer.experts[dominant]);
            like.map(|(named, typed)| {
                let mut piece = |named: Piece, typed: Piece| {
                    let entry = source.store.entry(named.tensor);
                    let dtype = source.store.entry(typed.tensor).dtype;
                    let tensor = *fused.entry(named.tensor).or_insert_with(|| {
                        let mut shape = entry.shape.clone();
                        if shape.len() == 3 {
                            shape[0] = slots;
                        }
                        self.push(&entry.name, dtype, shape, None)
                    });
                    Piece { tensor, ..named }
                };
                let weight = piece(named.weight, typed.weight);
                let bias = named.bias.zip(typed.bias).map(|(named, typed)| piece(named, typed));
                Projection { role: named.role, weight, bias }
            })
            .collect()
        });
        let experts = experts.collect();
        let id = layer.id;
        self.layers.insert(id, LayerTensors { id, router, router_bias, correction, experts });
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
                1 => super::folder::SINGLE.to_owned(),
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
        if let Some(bias) = &mut projection.bias {
            bias.tensor = rank[bias.tensor];
        }
    }
}

/// Gives the tensors of a file their places and makes its header.
fn lay_out(name: String, outs: &mut [Out]) -> OutFile {
    let mut members = serde_json::Map::new();
    members.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0u64;
    for out in &mut *outs {
        (out.at, end) = (end, end + out.bytes as u64);
        let (dtype, shape, offsets) = (out.dtype.name(), &out.shape, [out.at, end]);
        let member = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        members.insert(out.name.clone(), member);
    }
    let mut text = serde_json::Value::Object(members).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    outs.iter_mut().for_each(|out| out.at += header.len() as u64);
    let size = header.len() as u64 + end;
    OutFile { name, header, size }
}
