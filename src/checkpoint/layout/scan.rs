//! From tensor names to MoE layers: which blocks have experts, and in which layout.

use std::collections::BTreeMap;

use super::names;
use super::names::{Layout, Part};
use super::scan_layer;
use super::scan_layer::LayerTensors;
use super::sparse_layers::check_sparse_layers;
use super::stack::{Belongs, Depth, LanguageStack};
use crate::checkpoint::config::Config;
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

/// Finds the MoE layers of the language model and compares them with its config; `merged` says how
/// many experts a layer of a native folder has, where its tensors do not.
///
/// # Errors
/// [`ErrorKind::Config`] when layers are missing, left over or not recognised, naming all;
/// [`ErrorKind::Unsupported`] for expert tensors of an unknown layout or data type,
/// [`ErrorKind::Format`] and [`ErrorKind::Shape`] when a layer's tensors do not fit each other.
pub(crate) fn scan(
    store: &Store,
    family: &str,
    config: &Config,
    merged: impl Fn(LayerId) -> Option<usize>,
) -> Result<Scan> {
    let mut blocks: BTreeMap<LayerId, Block> = BTreeMap::new();
    let (mut mtp, mut routers) = (Vec::new(), Vec::new());
    let layouts = families::layouts(family);
    let stack = LanguageStack::find(store, &layouts, Depth::read(config)?)?;
    for (tensor, entry) in store.tensors().iter().map(|t| &t.entry).enumerate() {
        let site = names::site(&entry.name);
        match stack.belongs(&entry.name) {
            Belongs::Model => {}
            Belongs::Elsewhere => continue,
            Belongs::Prediction => {
                mtp.push(tensor);
                continue;
            }
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
    check_layers(store, &stack, config, &blocks)?;
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

/// Compares the layers with experts with those of the config.
fn check_layers(
    store: &Store,
    stack: &LanguageStack,
    config: &Config,
    blocks: &BTreeMap<LayerId, Block>,
) -> Result<()> {
    let Some(count) = Depth::read(config)?.layers() else { return Ok(()) };
    if blocks.keys().any(|id| id.stack != Stack::Causal) {
        return Ok(());
    }
    let found = blocks.keys().map(|id| id.index).collect();
    let mut others: BTreeMap<usize, Vec<(&str, &[usize])>> = BTreeMap::new();
    for entry in store.tensors().iter().map(|t| &t.entry) {
        let Some((id, _, rest)) = names::site(&entry.name) else { continue };
        if stack.belongs(&entry.name) == Belongs::Model && !blocks.contains_key(&id) {
            others.entry(id.index).or_default().push((rest, &entry.shape));
        }
    }
    check_sparse_layers(config, count, &found, &others)
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
