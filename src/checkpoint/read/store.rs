//! All tensors of a checkpoint: mapped files and a table of names.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::file_stamp::Stamp;
use super::memory_map::Map;
use super::shards;
use super::shards::Files;
use crate::checkpoint::config::Config;
use crate::checkpoint::layout::is_index;
use crate::checkpoint::quant::{Quantised, Scheme};
use crate::error::{Error, Locate, Result};
use crate::tensor_file::{Header, TensorEntry, open_error};

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Map,
    stamp: Stamp,
}

/// A tensor and the file that holds it.
#[derive(Debug)]
pub(crate) struct Tensor {
    file: usize,
    pub(crate) entry: TensorEntry,
}

impl Tensor {
    /// Its size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.entry.range.len()
    }
}

/// Mapped files and their tensors, in the order of files and data.
#[derive(Debug)]
pub(crate) struct Store {
    shards: Vec<Shard>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    quantised: Quantised,
}

impl Store {
    /// Maps the files of `dir` and checks their headers against each other and the index.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let Files { paths, promised } = shards::files(dir)?;
        let mut store = Self {
            shards: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            quantised: Quantised::default(),
        };
        for (file, path) in paths.into_iter().enumerate() {
            let (shard, entries) = map(&path).in_file(&path)?;
            store.shards.push(shard);
            for entry in entries {
                store.insert(Tensor { file, entry }).in_file(&path)?;
            }
        }
        if let Some(promised) = promised {
            let index = dir.join(shards::INDEX);
            for (name, file) in &promised {
                let found = store.get(name).map(|t| store.tensors[t].file);
                if found != Some(*file) {
                    let shard = store.shards[*file].path.display().to_string();
                    let reason = format!("the index promises it in {shard}, which lacks it");
                    return Err(Error::malformed("safetensors index", reason))
                        .in_tensor(name)
                        .in_file(&index);
                }
            }
            let stray = store.tensors.iter().find(|t| !promised.contains_key(&t.entry.name));
            if let Some(stray) = stray {
                return Err(Error::malformed("safetensors index", "the index does not name it"))
                    .in_tensor(&stray.entry.name)
                    .in_file(&store.shards[stray.file].path);
            }
        }
        Ok(store)
    }

    fn insert(&mut self, tensor: Tensor) -> Result<()> {
        let name = tensor.entry.name.clone();
        if let Some(before) = self.by_name.insert(name.clone(), self.tensors.len()) {
            let other = &self.shards[self.tensors[before].file].path;
            let reason = format!("{} holds it too", other.display());
            return Err(Error::malformed("checkpoint", reason)).in_tensor(&name);
        }
        self.tensors.push(tensor);
        Ok(())
    }

    /// All tensors, in the order of files and data.
    pub(crate) fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The position of a tensor in [`Store::tensors`].
    pub(crate) fn get(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// A tensor's header entry.
    pub(crate) fn entry(&self, tensor: usize) -> &TensorEntry {
        &self.tensors[tensor].entry
    }

    /// The quantised weights and their scales.
    pub(crate) fn quantised(&self) -> &Quantised {
        &self.quantised
    }

    /// Finds the quantised weights of a model with `config`, which was read from `path`.
    pub(crate) fn find_quantised(&mut self, config: &Config, path: &Path) -> Result<()> {
        self.quantised = Quantised::find(self, config, path)?;
        Ok(())
    }

    /// The number of values in some bytes of a tensor.
    pub(crate) fn values(&self, tensor: usize, bytes: usize) -> usize {
        match self.quantised.scheme(tensor) {
            Some(Scheme::Mxfp4 { .. }) => bytes * 2,
            _ => bytes / self.entry(tensor).dtype.alignment(),
        }
    }

    /// The name of a tensor's data type.
    pub(crate) fn dtype_name(&self, tensor: usize) -> &'static str {
        match self.quantised.scheme(tensor) {
            Some(Scheme::Mxfp4 { .. }) => "MXFP4",
            _ => self.entry(tensor).dtype.name(),
        }
    }

    /// A tensor's number of parameters; scales are none.
    pub(crate) fn parameters(&self, tensor: usize) -> usize {
        match (self.quantised.scaled(tensor), self.quantised.scheme(tensor)) {
            (Some(_), _) => 0,
            (None, Some(_)) => self.values(tensor, self.tensors[tensor].bytes()),
            (None, None) if is_index(&self.entry(tensor).name) => 0,
            (None, None) => self.entry(tensor).shape.iter().product(),
        }
    }

    /// A tensor and that of its scales.
    pub(crate) fn with_scales(&self, tensor: usize) -> impl Iterator<Item = usize> {
        [Some(tensor), self.quantised.scheme(tensor).map(Scheme::scales)].into_iter().flatten()
    }

    /// Runs `read`, which reads a tensor and its scales, between two looks at their files: what
    /// comes back was read from files that are as they were.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`](crate::ErrorKind::Changed) with the file, and those of `read`.
    pub(crate) fn unchanged<T>(
        &self,
        tensor: usize,
        read: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.check(tensor)?;
        let found = read();
        self.check(tensor)?;
        found
    }

    /// Checks that the files of a tensor and its scales were not changed.
    pub(crate) fn check(&self, tensor: usize) -> Result<()> {
        self.with_scales(tensor).try_for_each(|tensor| {
            let Shard { path, stamp, .. } = &self.shards[self.tensors[tensor].file];
            stamp.check(path)
        })
    }

    /// A tensor's bytes; see [`Store::unchanged`].
    pub(crate) fn bytes(&self, tensor: usize) -> &[u8] {
        let Tensor { file, entry } = &self.tensors[tensor];
        &self.shards[*file].map.bytes()[entry.range.clone()]
    }

    /// All files.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| &*shard.path)
    }

    /// The file that holds a tensor.
    pub(crate) fn path(&self, tensor: usize) -> &Path {
        &self.shards[self.tensors[tensor].file].path
    }

    /// Lets the pages of a part of a tensor go.
    pub(crate) fn release(&self, tensor: usize, part: std::ops::Range<usize>) {
        let Tensor { file, entry } = &self.tensors[tensor];
        let start = entry.range.start;
        self.shards[*file].map.release(start + part.start..start + part.end);
    }
}

fn map(path: &Path) -> Result<(Shard, Vec<TensorEntry>)> {
    let io = |e| open_error("open", path, e);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::malformed("checkpoint", "not a regular file"));
    }
    let file = File::open(path).map_err(io)?;
    if metadata.len() == 0 {
        // An empty file cannot be mapped.
        return Header::parse(&[]).and_then(|_| Err(Error::malformed("checkpoint", "it is empty")));
    }
    let stamp = Stamp::of(&file.metadata().map_err(io)?);
    // The map outlives the file's handle: a thousand shards need none.
    let map = Map::of(&file)?;
    let entries = Header::parse(map.bytes())?.tensors;
    Ok((Shard { path: path.to_owned(), map, stamp }, entries))
}
