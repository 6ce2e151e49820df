//! The native folder's expert map: which of the router's `N` rows leads to which of `M` experts.
//!
//! Kept in `config.json` under `"mcsmoe"`; the model type is replaced, so that a runtime that does
//! not know the map refuses the folder instead of computing something else. `modeling_mcsmoe.py`,
//! which lies in the folder, knows it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document::{Config, mismatch};
use crate::error::Result;
use crate::model::{Grouping, LayerId};

/// The model type of native folders, and the key of their map.
pub(crate) const NATIVE: &str = "mcsmoe";
const FORMAT: u64 = 1;

/// What a native folder adds to `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Native {
    /// The version of this object.
    pub(crate) format: u64,
    /// What the keys of the original config said.
    pub(crate) base_model_type: Value,
    #[serde(default)]
    pub(crate) base_architectures: Value,
    #[serde(default)]
    pub(crate) base_auto_map: Value,
    /// Layers that are not named here are as they were.
    pub(crate) expert_map: BTreeMap<LayerId, Grouping>,
}

impl Native {
    /// The map for a model with `config`.
    pub(crate) fn new(config: &Config, expert_map: BTreeMap<LayerId, Grouping>) -> Self {
        let base = |key| config.outer(key).cloned().unwrap_or(Value::Null);
        Self {
            format: FORMAT,
            base_model_type: base("model_type"),
            base_architectures: base("architectures"),
            base_auto_map: base("auto_map"),
            expert_map,
        }
    }

    /// The map of a native folder, `None` for an ordinary one.
    pub(crate) fn read(config: &Config) -> Result<Option<Self>> {
        if config.outer_string("model_type")? != Some(NATIVE) {
            return Ok(None);
        }
        let Some(value) = config.get(NATIVE) else {
            return Err(mismatch(NATIVE, "the expert map of a native folder", "nothing"));
        };
        let native: Self = serde_json::from_value(value.clone())
            .map_err(|e| mismatch(NATIVE, "the expert map of a native folder", e))?;
        if native.format != FORMAT {
            return Err(mismatch("mcsmoe.format", &FORMAT.to_string(), native.format));
        }
        Ok(Some(native))
    }
}
