//! A pipeline as data: TOML, YAML or JSON, with named presets.
//!
//! ```toml
//! preset = "m-smoe"
//! export = "native"
//! [keep]
//! experts = 4
//! ```

pub(super) mod choices;
pub(super) mod compress_choice;
pub(super) mod presets;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Export;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::group::Spread;
use crate::pipeline::builder::{Pipeline, PipelineBuilder};
use crate::pipeline::options::{Constraints, Keep, RecoverOn, RoutingGroupPolicy};
use crate::pipeline::recipe::choices::{
    AlignChoice, FactoriseChoice, GroupChoice, MergeChoice, RecoverChoice, RouterChoice,
    SimilarityChoice,
};
use crate::pipeline::recipe::compress_choice::CompressChoice;

/// A whole run, as data. Every field has a stable name and is copied into the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The preset that it started from, for the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// How many experts stay.
    pub keep: Keep,
    /// What is written.
    pub export: ExportChoice,
    /// How alike experts are.
    pub similarity: SimilarityChoice,
    /// How hidden units are lined up.
    pub align: AlignChoice,
    /// Which experts become one.
    pub group: GroupChoice,
    /// How they become one.
    pub merge: MergeChoice,
    /// The router of a stock export; native and expanded exports keep the `n`-row router.
    pub router: RouterChoice,
    /// What brings each merged layer back towards the original's output, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recover: Vec<RecoverChoice>,
    /// Most tokens of a text that recovery and compression see; all unless given. See
    /// [`PipelineBuilder::recover_tokens`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover_tokens: Option<usize>,
    /// What recovery is fitted on, in a run on text. See [`PipelineBuilder::recover_on`].
    #[serde(default)]
    pub recover_on: RecoverOn,
    /// What every matrix of the merged and recovered experts is compressed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<CompressChoice>,
    /// Protected layers and experts, group capacity, least number per layer.
    #[serde(default)]
    pub constraints: Constraints,
    /// What happens to group-limited routing in a stock export.
    #[serde(default)]
    pub routing_groups: RoutingGroupPolicy,
    /// Lower number of experts per token in a stock export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Whether each layer's output error on the samples is measured and reported.
    #[serde(default = "yes")]
    pub measure_error: bool,
    /// Whether the singular values of each layer's matrices are measured and reported: of at most 4
    /// experts, before and after, by eigenvalues (`10 s³` operations a matrix of short side `s`).
    /// Unless given, where `s` is at most 256 and the run holds layers as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measure_spectra: Option<bool>,
    /// Who factorises matrices.
    #[serde(default)]
    pub factorise: FactoriseChoice,
    /// Seed of every random choice.
    #[serde(default)]
    pub seed: u64,
    /// Largest size of an output file, in bytes.
    #[serde(default = "five_gigabytes")]
    pub shard_bytes: u64,
}

/// What is written; see the README for what each export saves and where it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportChoice {
    /// Fewer experts and a narrowed router: loads in unmodified runtimes.
    Stock,
    /// The `n`-row router and an expert map: the paper's semantics, for this crate and, with the
    /// code that lies in the folder, for transformers.
    Native,
    /// A copy of its group's expert for every expert: exact anywhere, saves nothing.
    Expanded,
}

impl From<ExportChoice> for Export {
    fn from(choice: ExportChoice) -> Self {
        match choice {
            ExportChoice::Stock => Self::Stock,
            ExportChoice::Native => Self::Native,
            ExportChoice::Expanded => Self::Expanded,
        }
    }
}

fn yes() -> bool {
    true
}

fn five_gigabytes() -> u64 {
    5_000_000_000
}

impl Recipe {
    /// A named preset that keeps `keep` and writes a native folder; the names are
    /// [`Recipe::PRESETS`].
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] for an unknown name.
    pub fn preset(name: &str, keep: Keep) -> Result<Self> {
        presets::preset(name, keep)
    }

    /// The names of all presets.
    pub const PRESETS: &'static [&'static str] = presets::NAMES;

    /// The same recipe with another export.
    #[must_use]
    pub fn export(mut self, export: ExportChoice) -> Self {
        self.export = export;
        self
    }

    /// Parses TOML. Keys that are left out come from `preset`, which is then required.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] that names the key.
    pub fn from_toml(text: &str) -> Result<Self> {
        let value: toml::Table = text.parse().map_err(|e| invalid(&e))?;
        Self::from_value(serde_json::to_value(value).map_err(|e| invalid(&e))?)
    }

    /// Parses YAML; as [`Recipe::from_toml`].
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] that names the key.
    pub fn from_yaml(text: &str) -> Result<Self> {
        Self::from_value(serde_yaml_ng::from_str(text).map_err(|e| invalid(&e))?)
    }

    /// Reads a `.toml`, `.yaml`, `.yml` or `.json` file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Unsupported`] for another ending, [`ErrorKind::Recipe`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read recipe", e));
        let parsed = text.and_then(|text| match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => Self::from_toml(&text),
            // JSON is YAML.
            Some("yaml" | "yml" | "json") => Self::from_yaml(&text),
            other => Err(ErrorKind::Unsupported {
                what: "recipe format",
                found: other.unwrap_or("no file ending").into(),
                supported: ".toml, .yaml, .yml, .json".into(),
            }
            .into()),
        });
        parsed.in_file(path)
    }

    fn from_value(mut value: serde_json::Value) -> Result<Self> {
        let reason = "a recipe is a table of keys";
        let given = value.as_object_mut().ok_or_else(|| invalid(&reason))?;
        let Some(name) = given.get("preset").and_then(|p| p.as_str()) else {
            return serde_json::from_value(value).map_err(|e| invalid(&e));
        };
        let keep = given.get("keep").cloned().ok_or_else(|| invalid(&"missing field `keep`"))?;
        let keep = serde_json::from_value(keep).map_err(|e| invalid(&format!("keep: {e}")))?;
        let base = Self::preset(name, keep)?;
        let mut base = serde_json::to_value(base).map_err(|e| invalid(&e))?;
        if let Some(base) = base.as_object_mut() {
            // A stage that is given replaces the preset's stage whole: its other options belong to
            // another method.
            base.extend(given.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        serde_json::from_value(base).map_err(|e| invalid(&e))
    }

    /// The recipe as TOML, with every default written out.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] if it cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| invalid(&e))
    }

    /// The pipeline that this recipe describes. A stage of one's own can replace any part.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a compression of rank 0, [`ErrorKind::Unsupported`] for
    /// LAPACK in a build without it.
    pub fn builder(&self) -> Result<PipelineBuilder> {
        let stock = self.export == ExportChoice::Stock;
        // The paper spreads the budget over layers; a stock folder cannot.
        let spread = if stock { Spread::Uniform } else { Spread::Global };
        let mut builder = Pipeline::builder()
            .keep(self.keep)
            .constraints(self.constraints.clone())
            .routing_groups(self.routing_groups)
            .top_k(self.top_k)
            .measure_error(self.measure_error)
            .measure_spectra(self.measure_spectra)
            .recover_tokens(self.recover_tokens)
            .recover_on(self.recover_on)
            .seed(self.seed)
            .recipe(serde_json::to_value(self).map_err(|e| invalid(&e))?);
        builder = self.factorise.add_to(builder)?;
        builder = self.similarity.add_to(builder);
        builder = self.align.add_to(builder);
        builder = self.group.add_to(builder, spread);
        builder = self.merge.add_to(builder);
        if stock {
            builder = self.router.add_to(builder);
        }
        if !self.recover.is_empty() {
            builder = builder.recoverer(RecoverChoice::chain(&self.recover));
        }
        if let Some(compress) = self.compress {
            builder = compress.add_to(builder)?;
        }
        Ok(builder)
    }
}

fn invalid(reason: &impl std::fmt::Display) -> Error {
    ErrorKind::Recipe { reason: reason.to_string() }.into()
}
