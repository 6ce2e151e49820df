//! From tensor names to MoE layers: which blocks have experts, and in which layout.

use std::collections::BTreeMap;

use super::names;
use super::names::{Layout, Part};
use super::scan_layer;
use super::scan_layer::LayerTensors;
use crate::checkpoint::read::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::families;
use crate::model::{LayerId, Stack};

pub(crate) const FORMAT: &str = "MoE layer";

/// What the names of a checkpoint say.
pub(crate) struct Scan {
    pub(crate) layout: &'static Layout,
    /// Sorted by layer.
    pub(crate) layers: Vec<LayerTensors>,
    /// Tensors of multi-token-prediction layers.
    pub(crate) mtp: Vec<usize>,
}

/// An MoE block whose experts have been seen.
pub(crate) struct Block {
    pub(crate) prefix: String,
    pub(crate) layout: &'static Layout,
    pub(crate) parts: Vec<(Part, usize)>,
}

/// Finds the MoE layers. Blocks at or above `hidden_layers` only predict further tokens; `merged`
/// tells how many experts a layer of a native folder has, where its tensors do not.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for expert tensors of an unknown layout or data type,
/// [`ErrorKind::Format`] and [`ErrorKind::Shape`] when a layer's tensors do not fit each other.
pub(crate) fn scan(
    store: &Store,
    family: &str,
    hidden_layers: Option<usize>,
    merged: impl Fn(LayerId) -> Option<usize>,
) -> Result<Scan> {
    let mut blocks: BTreeMap<LayerId, Block> = BTreeMap::new();
    let (mut mtp, mut routers) = (Vec::new(), Vec::new());
    let layouts = families::layouts(family);
    for (tensor, entry) in store.tensors().iter().map(|t| &t.entry).enumerate() {
        let site = names::site(&entry.name);
        if is_mtp(&entry.name, site.map(|(id, ..)| id), hidden_layers) {
            mtp.push(tensor);
            continue;
        }
        if store.quantised().scaled(tensor).is_some() {
            continue;
        }
        let part = site.and_then(|(id, at, rest)| {
            let has_router = |l: &Layout| {
                l.router.iter().any(|r| store.get(&format!("{}{r}", &entry.name[..at])).is_some())
            };
            let read = |l: &'static Layout| {
                let part = l.part(rest)?;
                (!l.is_interleaved() || has_router(l)).then_some((id, at, l, part))
            };
            layouts.iter().copied().find_map(read)
        });
        match (part, site) {
            (Some((id, at, layout, part)), _) => {
                let prefix = &entry.name[..at];
                insert(&mut blocks, id, prefix, layout, (part, tensor)).in_tensor(&entry.name)?;
            }
            (None, _) if names::looks_like_experts(&entry.name) => {
                return Err(unsupported(&entry.name))
                    .in_tensor(&entry.name)
                    .in_file(store.path(tensor));
            }
            (None, Some((id, _, rest))) if is_router(&layouts, rest) => routers.push((id, tensor)),
            (None, _) => {}
        }
    }
    if let Some((id, tensor)) = routers.iter().find(|(id, _)| !blocks.contains_key(id)) {
        return Err(Error::malformed(FORMAT, "a router without experts"))
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
        layers.push(scan_layer::layer(store, *id, block, merged(*id)).in_layer(id)?);
    }
    Ok(Scan { layout, layers, mtp })
}

fn is_mtp(name: &str, id: Option<LayerId>, hidden_layers: Option<usize>) -> bool {
    let beyond =
        |id: LayerId| id.stack == Stack::Causal && hidden_layers.is_some_and(|n| id.index >= n);
    // A vision tower may be deeper than the language model.
    let text = !name.contains("vision") && !name.contains("visual") && !name.contains("audio");
    name.starts_with("mtp.") || name.contains(".mtp.") || (text && id.is_some_and(beyond))
}

fn is_router(layouts: &[&Layout], rest: &str) -> bool {
    layouts.iter().any(|l| l.router.contains(&rest))
}

/// An expert layout that cannot be read.
pub(crate) fn unsupported(found: &str) -> Error {
    let (found, supported) = (found.to_owned(), names::supported());
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
        return Err(Error::malformed(FORMAT, reason)).in_layer(id);
    }
    block.parts.push(part);
    Ok(())
}
