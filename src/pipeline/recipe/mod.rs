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
mod parse;
pub(super) mod presets;

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
use crate::pipeline::recipe::parse::Table;

/// A whole run, as data. Every field has a stable name and is copied into the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The preset that it started from, for the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// How many experts stay.
    pub keep: Keep,
    /// What is written; a stock folder unless given.
    #[serde(default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportChoice {
    /// Fewer experts and a narrowed router: loads in unmodified runtimes.
    #[default]
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
    /// A named preset that keeps `keep`; the names are [`Recipe::PRESETS`].
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] for an unknown name.
    pub fn preset(name: &str, keep: Keep) -> Result<Self> {
        presets::preset(name, keep)
    }

    /// The names of all presets.
    pub const PRESETS: &'static [&'static str] = presets::NAMES;

    /// The preset of everything that names none: of the tool's commands, and of recipes that name
    /// no preset and no stage.
    pub const DEFAULT_PRESET: &'static str = presets::DEFAULT;

    /// The file of a preset: TOML with comments, complete but for `keep`.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] for an unknown name.
    pub fn preset_file(name: &str) -> Result<&'static str> {
        presets::text(name)
    }

    /// The same recipe with another export.
    #[must_use]
    pub fn export(mut self, export: ExportChoice) -> Self {
        self.export = export;
        self
    }

    /// Parses TOML.
    ///
    /// Keys that are left out come from `preset`, or from [`Recipe::DEFAULT_PRESET`] where the file
    /// names no preset and no stage. A table of a stage that names a method replaces the preset's;
    /// a table without a method changes the options that it names.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] that names the key.
    pub fn from_toml(text: &str) -> Result<Self> {
        Self::from_value(parse::toml(text)?)
    }

    /// Parses YAML; as [`Recipe::from_toml`].
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] that names the key.
    pub fn from_yaml(text: &str) -> Result<Self> {
        Self::from_value(parse::yaml(text)?)
    }

    /// Parses JSON; as [`Recipe::from_toml`].
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] that names the key.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_value(parse::json(text)?)
    }

    /// Reads a `.toml`, `.yaml`, `.yml` or `.json` file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Unsupported`] for another ending, [`ErrorKind::Recipe`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read recipe", e));
        let parsed = text.and_then(|text| match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => Self::from_toml(&text),
            Some("yaml" | "yml") => Self::from_yaml(&text),
            Some("json") => Self::from_json(&text),
            other => Err(ErrorKind::Unsupported {
                what: "recipe format",
                found: other.unwrap_or("no file ending").into(),
                supported: ".toml, .yaml, .yml, .json".into(),
            }
            .into()),
        });
        parsed.in_file(path)
    }

    /// A preset's file, completed.
    pub(super) fn from_preset(file: &str, name: &str, keep: Keep) -> Result<Self> {
        let mut value = parse::toml(file)?;
        value.insert("preset".into(), name.into());
        value.insert("keep".into(), serde_json::to_value(keep).map_err(|e| invalid(&e))?);
        Self::complete(value)
    }

    fn from_value(given: Table) -> Result<Self> {
        let stages = ["similarity", "align", "group", "merge", "router", "recover", "compress"];
        let name = match given.get("preset") {
            Some(Value::String(name)) => name.clone(),
            Some(_) => return Err(invalid(&"preset: the name of a preset in quotation marks")),
            None if stages.iter().any(|stage| given.contains_key(*stage)) => {
                return Self::complete(given);
            }
            None => presets::DEFAULT.to_owned(),
        };
        let mut whole = parse::toml(presets::text(&name)?)?;
        whole.insert("preset".into(), name.into());
        for (key, value) in given {
            match (whole.get_mut(&key), value) {
                (Some(Value::Object(base)), Value::Object(options)) if !names_method(&options) => {
                    base.extend(options);
                }
                (_, value) => {
                    whole.insert(key, value);
                }
            }
        }
        Self::complete(whole)
    }

    /// A recipe of a table in which nothing is left to a preset. Stages are first read one by one,
    /// so that an error says in which of them it is.
    fn complete(table: Table) -> Result<Self> {
        check_stage::<SimilarityChoice>(&table, "similarity")?;
        check_stage::<AlignChoice>(&table, "align")?;
        check_stage::<GroupChoice>(&table, "group")?;
        check_stage::<MergeChoice>(&table, "merge")?;
        check_stage::<RouterChoice>(&table, "router")?;
        check_stage::<Vec<RecoverChoice>>(&table, "recover")?;
        check_stage::<CompressChoice>(&table, "compress")?;
        check_stage::<Keep>(&table, "keep")?;
        check_stage::<Constraints>(&table, "constraints")?;
        let hint = match table.contains_key("preset") {
            true => "",
            false => " (a recipe that names no `preset` names every stage)",
        };
        serde_json::from_value(Value::Object(table)).map_err(|e| invalid(&format!("{e}{hint}")))
    }

    /// The recipe as TOML, with every default written out. It reads as the same recipe.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] if it cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(&self.recorded()?).map_err(|e| invalid(&e))
    }

    /// What a report records: the recipe, without its preset where options of the preset were
    /// removed, because a file cannot say that of an option.
    fn recorded(&self) -> Result<Self> {
        let text = serde_json::to_string(self).map_err(|e| invalid(&e))?;
        let read = parse::json(&text).and_then(Self::from_value);
        let same = read.is_ok_and(|read| read == *self);
        let preset = self.preset.clone().filter(|_| same);
        Ok(Self { preset, ..self.clone() })
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
            .seed(self.seed);
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
        // Last: stages that are set from here on are not the recipe's.
        Ok(builder.recipe(serde_json::to_value(self.recorded()?).map_err(|e| invalid(&e))?))
    }
}

/// Whether options begin a stage anew: they name its method.
fn names_method(options: &Table) -> bool {
    let is_count = |key: &String| ["experts", "fraction", "total"].contains(&key.as_str());
    options.keys().any(|key| key == "method" || key == "metric" || is_count(key))
}

fn check_stage<T: DeserializeOwned>(table: &Table, key: &str) -> Result<()> {
    let Some(value) = table.get(key) else { return Ok(()) };
    match serde_json::from_value::<T>(value.clone()) {
        Ok(_) => Ok(()),
        Err(error) => Err(invalid(&format!("{key}: {error}"))),
    }
}

pub(super) fn invalid(reason: &impl std::fmt::Display) -> Error {
    ErrorKind::Recipe { reason: reason.to_string() }.into()
}
