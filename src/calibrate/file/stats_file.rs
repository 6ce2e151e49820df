//! An opened statistics file: which layers it holds, what is known of each, and reading one.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::layer::Layer;
use super::tensor_names;
use super::tensor_names::{Axis, Sizes};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{LayerId, RoutingStats};
use crate::stage::Needs;
use crate::tensor_file::{Header, TensorEntry};

/// The format, as errors name it.
pub(super) const FORMAT: &str = "statistics file (safetensors)";
/// More experts per layer than any model has; bounds the Gram matrix of a hostile file.
pub(super) const MAX_EXPERTS: usize = 8192;

/// A statistics file whose header was read and checked. The data stays on disk until a layer is
/// asked for; threads may read different layers at once.
///
/// ```no_run
/// use mcsmoe::calibrate::StatsFile;
/// use mcsmoe::stage::Needs;
///
/// let file = StatsFile::open("mixtral.stats.safetensors")?;
/// for id in file.layers() {
///     let stats = file.layer(id, Needs::LOGIT_GRAM)?;
///     println!("{id}: {:?}", stats.usage());
/// }
/// # Ok::<(), mcsmoe::Error>(())
/// ```
#[derive(Debug)]
pub struct StatsFile {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorEntry>,
    ids: Vec<LayerId>,
    index: BTreeMap<LayerId, Index>,
}

/// What the header tells of one layer.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) sizes: Sizes,
    /// Observed tokens.
    pub(super) tokens: u64,
    /// Whether the per-token tensors cover only some of the observed tokens.
    pub(super) sampled: bool,
}

/// An entry of the metadata's `layers` list.
#[derive(Debug, Deserialize)]
struct Note {
    name: String,
    tokens: Option<u64>,
    top_k: Option<usize>,
    samples: Option<usize>,
}

impl StatsFile {
    /// Reads and checks the header: sizes, types and shapes of every tensor against each other and
    /// against the metadata.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Format`] when it is not a safetensors file,
    /// [`ErrorKind::Unsupported`] for a data type that the format does not allow,
    /// [`ErrorKind::Statistics`] when its parts contradict each other.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::read(path).in_file(path)
    }

    fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open statistics", e))?;
        let Header { tensors, metadata } = Header::read(&file)?;
        let mut index: BTreeMap<LayerId, Index> = BTreeMap::new();
        for TensorEntry { name, dtype, shape, .. } in &tensors {
            let Some((id, part)) = tensor_names::split(name) else { continue };
            let sizes = &mut index.entry(id).or_default().sizes;
            sizes.learn(part, *dtype, shape).in_tensor(name).in_layer(id)?;
        }
        if index.is_empty() {
            return Err(Error::malformed(FORMAT, "no tensor of any layer"));
        }
        let ids = index.keys().copied().collect();
        let tensors = tensors.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let mut this = Self { path: path.into(), file, metadata, tensors, ids, index };
        let notes = this.notes()?;
        let experts = this.declared_experts()?;
        let mut index = std::mem::take(&mut this.index);
        for (&id, entry) in &mut index {
            let note = notes.iter().find(|note| note.name == id.to_string());
            entry.complete(note, experts).in_layer(id)?;
            let sources = ["counts", "topk_indices"].map(|part| this.has(&id, part));
            if sources == [false, false] || (entry.sampled && !sources[0]) {
                let reason = "neither counts nor top-k indices of all tokens";
                return Err(contradiction(reason.into())).in_layer(id);
            }
        }
        Ok(Self { index, ..this })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[LayerId] {
        &self.ids
    }

    /// The family of the observed model, if the file tells (`mixtral`, `deepseek_v3`, …).
    pub fn model_type(&self) -> Option<&str> {
        self.metadata("model_type")
    }

    /// An entry of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The largest number of tokens that any layer observed; the stacks of an encoder-decoder model
    /// see different texts. Each layer's own number is in its [`RoutingStats::tokens`].
    pub fn tokens(&self) -> u64 {
        self.index.values().map(|entry| entry.tokens).max().unwrap_or(0)
    }

    /// Number of experts of a layer; `None` when the file does not hold the layer.
    pub fn experts(&self, layer: &LayerId) -> Option<usize> {
        self.index.get(layer)?.sizes.get(Axis::N)
    }

    /// What can be read or computed for a layer; nothing when the file does not hold it.
    pub fn available(&self, layer: &LayerId) -> Needs {
        let Some(entry) = self.index.get(layer) else { return Needs::NONE };
        let all = |parts: &[&str]| parts.iter().all(|part| self.has(layer, part));
        let of_all_tokens = |parts: &[&str]| !entry.sampled && all(parts);
        let routing = ["topk_indices", "topk_weights"];
        let sources = [
            (Needs::LOGIT_GRAM, all(&["logit_gram"]) || of_all_tokens(&["router_logits"])),
            (
                Needs::ROUTER_MASS,
                all(&["router_mass"]) || of_all_tokens(&routing) || all(&["expert_mean_gate"]),
            ),
            (Needs::OUTPUT_NORM, all(&["expert_out_norm"])),
            (Needs::REAP, all(&["reap_saliency"])),
            (Needs::MEAN_OUTPUT, all(&["expert_mean_output"])),
            (Needs::SAMPLES, all(&["moe_input", "router_logits"]) && all(&routing)),
            (Needs::GRADIENTS, all(&["grad.up", "grad.down"])),
            (Needs::FISHER, all(&["fisher.up", "fisher.down"])),
        ];
        sources.into_iter().filter(|(_, there)| *there).fold(Needs::NONE, |sum, (n, _)| sum | n)
    }

    /// Reads one layer: its counts, and of the rest only what `needs` asks for. Parts that the file
    /// lacks are computed from others where that is exact. [`Needs::EXPERTS`] is not a statistic
    /// and ignored.
    ///
    /// # Errors
    /// [`ErrorKind::Statistics`] when the layer is not in the file or its values contradict each
    /// other, [`ErrorKind::Missing`] when `needs` exceeds [`available`](Self::available),
    /// [`ErrorKind::NotFinite`] with tensor and index, [`ErrorKind::Io`].
    pub fn layer(&self, layer: &LayerId, needs: Needs) -> Result<RoutingStats> {
        self.read_layer(*layer, needs).in_layer(layer).in_file(&self.path)
    }

    fn read_layer(&self, id: LayerId, needs: Needs) -> Result<RoutingStats> {
        let Some(index) = self.index.get(&id) else {
            let found: Vec<String> = self.ids.iter().map(LayerId::to_string).collect();
            let reason = format!("the layer is not in the file, which holds {}", found.join(", "));
            return Err(contradiction(reason));
        };
        let lacking = needs.without(self.available(&id) | Needs::EXPERTS);
        if lacking != Needs::NONE {
            let needs = lacking.names().collect::<Vec<_>>().join(", ");
            let remedy = "collect them anew, or choose stages that need less".into();
            return Err(ErrorKind::Missing { stage: "the recipe".into(), needs, remedy }.into());
        }
        Layer { id, index, tensors: &self.tensors, file: &self.file }.read(needs)
    }

    fn has(&self, layer: &LayerId, part: &str) -> bool {
        self.tensors.contains_key(&format!("{layer}.{part}"))
    }

    fn notes(&self) -> Result<Vec<Note>> {
        let Some(json) = self.metadata("layers") else { return Ok(Vec::new()) };
        serde_json::from_str(json)
            .map_err(|e| Error::malformed(FORMAT, format!("metadata `layers`: {e}")))
    }

    fn declared_experts(&self) -> Result<Option<usize>> {
        let Some(text) = self.metadata("num_experts") else { return Ok(None) };
        let reason = format!("metadata `num_experts`: {text}");
        text.parse().map(Some).map_err(|_| Error::malformed(FORMAT, reason))
    }
}

impl Index {
    /// Takes the number of tokens from the note or the tensors, and checks one against the other.
    fn complete(&mut self, note: Option<&Note>, experts: Option<usize>) -> Result<()> {
        let found = self.sizes.get(Axis::N).unwrap_or(0);
        if found == 0 || found > MAX_EXPERTS || experts.is_some_and(|n| n != found) {
            let most = format!("1 to {MAX_EXPERTS}");
            let expected = experts.map_or(most, |n| n.to_string());
            return Err(contradiction(format!("experts: expected {expected}, found {found}")));
        }
        // A tensor without elements could claim any number of tokens.
        if let Some(axis) =
            [Axis::K, Axis::H, Axis::F].iter().find(|&&a| self.sizes.get(a) == Some(0))
        {
            return Err(contradiction(format!("{axis:?}: expected 1 or more, found 0")));
        }
        let rows = self.sizes.get(Axis::T);
        let declared = note.and_then(|note| note.tokens);
        let samples = note.and_then(|note| note.samples);
        let covered = samples.map(|s| s as u64).or(declared);
        if let (Some(rows), Some(covered)) = (rows, covered)
            && rows as u64 != covered
        {
            return Err(contradiction(format!("tokens: expected {covered}, found {rows} rows")));
        }
        let Some(tokens) = declared.or(rows.map(|t| t as u64)) else {
            return Err(contradiction("the number of observed tokens is not told".into()));
        };
        if let Some(k) = note.and_then(|note| note.top_k) {
            let found = self.sizes.get(Axis::K).unwrap_or(k);
            if k == 0 || found != k {
                return Err(contradiction(format!("top-k: expected {k}, found {found}")));
            }
            self.sizes.set(Axis::K, k);
        }
        (self.tokens, self.sampled) = (tokens, rows.is_some_and(|t| (t as u64) < tokens));
        Ok(())
    }
}

/// Statistics that contradict themselves or the model.
pub(super) fn contradiction(reason: String) -> Error {
    ErrorKind::Statistics { reason }.into()
}
