//! A checkpoint folder, open for reading.

use std::path::{Path, PathBuf};

use super::folder::check_folder;
use super::store::Store;
use super::tensor_source::TextModel;
use super::weights;
use crate::checkpoint::config::{Config, Native, mismatch};
use crate::checkpoint::layout::scan::Scan;
use crate::checkpoint::layout::{LayerTensors, Order, Projection, scan};
use crate::error::{Error, Locate, Result};
use crate::families;
use crate::model::{
    Activation, Expert, FactoredLayer, Grouping, LayerId, MergedLayer, MoeLayer, Router,
    RoutingRule,
};
use crate::par;

/// What is known of an MoE layer before its weights are read.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInfo {
    /// Which layer it is.
    pub id: LayerId,
    /// Number of experts on disk.
    pub experts: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of hidden units of an expert.
    pub d_ff: usize,
    /// How the router chooses.
    pub rule: RoutingRule,
    /// Whether the experts have a gate.
    pub gated: bool,
    /// The data type of the experts, by its safetensors name; `MXFP4` for pairs of 4-bit floats.
    pub dtype: String,
    /// Bytes of all experts on disk, their scales included, shared ones excluded.
    pub expert_bytes: u64,
    /// Parameters of all experts on disk, shared ones excluded.
    pub expert_parameters: u64,
    /// In a native folder, which of the router's rows leads to which expert.
    pub merged: Option<Grouping>,
}

/// A Hugging Face folder of an MoE model, memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    pub(in crate::checkpoint) dir: PathBuf,
    pub(in crate::checkpoint) store: Store,
    pub(in crate::checkpoint) config: Config,
    pub(in crate::checkpoint) native: Option<Native>,
    pub(in crate::checkpoint) tensors: Vec<LayerTensors>,
    pub(in crate::checkpoint) mtp: Vec<usize>,
    pub(in crate::checkpoint) text: TextModel,
    family: String,
    layout: &'static str,
    activation: Activation,
    layers: Vec<LayerInfo>,
}

impl Checkpoint {
    /// Opens a folder: `config.json`, and `model.safetensors.index.json` with its shards, or
    /// `model.safetensors`, or one other safetensors file. Reads headers only.
    ///
    /// The layout is recognised from the tensors' names. Files must not be truncated or rewritten
    /// while the checkpoint is open: size and time of a tensor's file are compared with those at
    /// the opening before and after it is read ([`Changed`](crate::ErrorKind::Changed)), but a
    /// file that is cut in the middle of a read ends the process (SIGBUS). Files may be removed
    /// or replaced by others.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io), [`Format`](crate::ErrorKind::Format) for a damaged or
    /// inconsistent file, [`Config`](crate::ErrorKind::Config) when `config.json` contradicts the
    /// tensors, [`Shape`](crate::ErrorKind::Shape) for experts that do not fit each other, and
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for layouts and data types this crate cannot
    /// read; each with file, tensor, layer and expert where there is one.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        check_folder(dir)?;
        let path = dir.join("config.json");
        let config = Config::open(&path)?;
        let native = Native::read(&config).in_file(&path)?;
        let family = match &native {
            Some(native) => native.base_model_type.as_str(),
            None => config.outer_string("model_type").in_file(&path)?,
        };
        let family = family.unwrap_or_default().to_owned();
        // A wrapper's language model routes as its own type says.
        let inner = config.string("model_type").in_file(&path)?;
        let routes_as = inner.filter(|name| families::find(name).is_some()).unwrap_or(&family);
        let mut store = Store::open(dir)?;
        store.find_quantised(&config, &path)?;
        let maps = native.as_ref().map(|n| &n.expert_map);
        let merged = |id| maps.and_then(|maps| maps.get(&id)).map(Grouping::groups);
        let Scan { layout, layers: tensors, mtp } =
            scan::scan(&store, &family, &config, merged).in_file(dir)?;
        let activation = families::expert_activation(config.keys(), layout).in_file(&path)?;
        let count = config.experts().in_file(&path)?;
        let info = |layer: &LayerTensors| {
            let merged = maps.and_then(|maps| maps.get(&layer.id));
            check_counts(&store, layer, count, merged).in_layer(layer.id).in_file(&path)?;
            let corrected = layer.correction.is_some();
            let rule =
                families::routing_rule(routes_as, config.keys(), corrected, || config.top_k());
            let rule = rule.in_file(&path)?;
            Ok(describe(&store, layer, rule, merged))
        };
        let layers = tensors.iter().map(info).collect::<Result<Vec<_>>>()?;
        if let Some(id) = maps.and_then(|m| m.keys().find(|id| layers.iter().all(|l| l.id != **id)))
        {
            return Err(mismatch("mcsmoe.expert_map", "MoE layers of the model", id))
                .in_file(&path);
        }
        let text = TextModel::new(&config, native.as_ref(), &store, &tensors);
        Ok(Self {
            dir: dir.to_owned(),
            store,
            config,
            native,
            tensors,
            mtp,
            text,
            family,
            layout: layout.name,
            activation,
            layers,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files that hold its tensors, in the order of their names.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.store.paths()
    }

    /// The model type; for a native folder that of the original. Empty when the config has none.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// The name of the tensor layout, e.g. `mixtral`.
    pub fn layout(&self) -> &'static str {
        self.layout
    }

    /// The folder's `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the folder was written by the native export.
    pub fn is_native(&self) -> bool {
        self.native.is_some()
    }

    /// The MoE layers in order; in encoder-decoder models the encoder's first.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// One MoE layer.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when there is no such MoE layer.
    pub fn layer(&self, id: LayerId) -> Result<&LayerInfo> {
        Ok(&self.layers[self.position(id)?])
    }

    /// Whether a native folder can hold this checkpoint's experts in factors: every projection has
    /// a tensor of its own.
    pub fn can_hold_factors(&self) -> bool {
        self.tensors.iter().flat_map(|l| l.experts.iter().flatten()).all(|p| self.own_tensors(p))
    }

    /// Whether a projection is all of its tensor, as it lies in memory.
    pub(in crate::checkpoint) fn own_tensors(&self, projection: &Projection) -> bool {
        let Projection { weight, order, .. } = projection;
        let shape = &self.store.entry(weight.tensor).shape;
        *order == Order::PLAIN && *shape == [weight.rows, weight.cols]
    }

    pub(in crate::checkpoint) fn position(&self, id: LayerId) -> Result<usize> {
        let missing = |_| {
            let names: Vec<String> = self.layers.iter().map(|l| l.id.to_string()).collect();
            Error::range("MoE layer", names.join(", "), id)
        };
        self.layers.binary_search_by_key(&id, |l| l.id).map_err(missing)
    }

    /// Number of parameters of the whole model; a quantised one counts as one, its scales as none.
    pub fn total_parameters(&self) -> u64 {
        (0..self.store.tensors().len()).map(|t| self.store.parameters(t) as u64).sum()
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.store.tensors().iter().map(|t| t.bytes() as u64).sum()
    }

    /// Name, data type and shape of every tensor, in the order of files and data.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &'static str, &[usize])> {
        let entries = self.store.tensors().iter().map(|t| &t.entry);
        entries.map(|e| (&*e.name, e.dtype.name(), &*e.shape))
    }

    /// The bytes of a tensor, little-endian and row-major, at any alignment.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when there is no such tensor;
    /// [`Changed`](crate::ErrorKind::Changed).
    pub fn tensor_bytes(&self, name: &str) -> Result<&[u8]> {
        let found = self.store.get(name);
        let found = found.ok_or_else(|| Error::range("tensor", "a tensor of the model", name))?;
        self.store.check(found).in_tensor(name)?;
        Ok(self.store.bytes(found))
    }

    /// Names of the tensors of multi-token-prediction layers, which are not MoE layers of the
    /// model: nothing routes to them without a drafting runtime.
    pub fn mtp_tensors(&self) -> impl Iterator<Item = &str> {
        self.mtp.iter().map(|&t| &*self.store.entry(t).name)
    }

    /// The router of a layer, `N` rows also in a native folder.
    ///
    /// # Errors
    /// [`NotFinite`](crate::ErrorKind::NotFinite) with file and tensor, and those of
    /// [`Router::new`].
    pub fn read_router(&self, id: LayerId) -> Result<Router> {
        let at = self.position(id)?;
        weights::router(&self.store, &self.tensors[at], self.layers[at].rule).in_layer(id)
    }

    /// Expert `expert` of those on disk.
    ///
    /// # Errors
    /// [`NotFinite`](crate::ErrorKind::NotFinite) with file, tensor, layer and expert;
    /// [`Changed`](crate::ErrorKind::Changed) for a file that was written to since it was opened.
    pub fn read_expert(&self, id: LayerId, expert: usize) -> Result<Expert> {
        let at = self.position(id)?;
        weights::expert(&self.store, &self.tensors[at], expert, self.activation).in_layer(id)
    }

    /// A whole layer.
    ///
    /// # Errors
    /// As [`Checkpoint::read_expert`]; [`Shape`](crate::ErrorKind::Shape) for a merged layer of a
    /// native folder, which is for [`Checkpoint::read_merged`].
    pub fn read_layer(&self, id: LayerId) -> Result<MoeLayer> {
        MoeLayer::new(id, self.read_experts(id)?, self.read_router(id)?)
    }

    /// A whole layer with its expert map: the identity unless the folder is a native one.
    ///
    /// # Errors
    /// As [`Checkpoint::read_expert`].
    pub fn read_merged(&self, id: LayerId) -> Result<MergedLayer> {
        let info = self.layer(id)?;
        let identity = || Grouping::identity(info.experts);
        let grouping = info.merged.clone().unwrap_or_else(identity);
        MergedLayer::new(id, self.read_experts(id)?, grouping, self.read_router(id)?, None)
    }

    /// A layer of a native folder whose experts lie in factors, with these; `None` for any other.
    ///
    /// # Errors
    /// As [`Checkpoint::read_expert`].
    pub fn read_factored(&self, id: LayerId) -> Result<Option<FactoredLayer>> {
        let tensors = &self.tensors[self.position(id)?];
        if tensors.experts.iter().flatten().all(|projection| projection.factors.is_none()) {
            return Ok(None);
        }
        let count = tensors.experts.len();
        let experts = par::map(count, |i| {
            weights::expert_in_factors(&self.store, tensors, i, self.activation).in_layer(id)
        })?;
        let grouping = self.layer(id)?.merged.clone();
        let grouping = grouping.unwrap_or_else(|| Grouping::identity(count));
        Ok(Some(FactoredLayer { id, experts, grouping, router: self.read_router(id)? }))
    }

    fn read_experts(&self, id: LayerId) -> Result<Vec<Expert>> {
        par::map(self.layer(id)?.experts, |i| self.read_expert(id, i))
    }

    /// Gives back the memory of a layer's pages; reading it again brings them back.
    pub fn release(&self, id: LayerId) {
        let Ok(at) = self.position(id) else { return };
        let layer = &self.tensors[at];
        let tensors = layer.routing().chain(layer.expert_tensors());
        for tensor in tensors.flat_map(|t| self.store.with_scales(t)) {
            self.store.release(tensor, 0..self.store.bytes(tensor).len());
        }
    }
}

/// Checks the numbers of experts that config, router, map and tensors state.
fn check_counts(
    store: &Store,
    layer: &LayerTensors,
    count: usize,
    merged: Option<&Grouping>,
) -> Result<()> {
    let router = store.entry(layer.router);
    let rows = router.shape.first().copied().unwrap_or(0);
    let (routed, expected) = merged.map_or((rows, rows), |g| (g.experts(), g.groups()));
    if routed != rows {
        return Err(Error::shape("expert map per router row", rows, routed))
            .in_tensor(&router.name);
    }
    let found = layer.experts.len();
    if found != expected {
        return Err(Error::shape("experts per router row", expected, found))
            .in_tensor(&router.name)
            .in_file(store.path(layer.router));
    }
    if rows != count {
        let found = format!("{rows} in {}", router.name);
        return Err(mismatch("number of experts", &count.to_string(), found));
    }
    Ok(())
}

fn describe(
    store: &Store,
    layer: &LayerTensors,
    rule: RoutingRule,
    merged: Option<&Grouping>,
) -> LayerInfo {
    let tensors = layer.expert_tensors();
    let on_disk = tensors.iter().flat_map(|&t| store.with_scales(t));
    let down = layer.experts.first().and_then(|e| e.last()).map(|p| p.weight);
    LayerInfo {
        id: layer.id,
        experts: layer.experts.len(),
        d_model: down.map_or(0, |p| p.rows),
        d_ff: down.map_or(0, |p| p.cols),
        rule,
        gated: layer.experts.first().is_some_and(|e| e.len() == 3),
        dtype: down.map_or("", |p| store.dtype_name(p.tensor)).to_owned(),
        expert_bytes: on_disk.map(|t| store.tensors()[t].bytes() as u64).sum(),
        expert_parameters: tensors.iter().map(|&t| store.parameters(t) as u64).sum(),
        merged: merged.cloned(),
    }
}
