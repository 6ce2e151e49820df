//! What is asked of a writer, and what it made of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::checkpoint::layout::Factoring;
use crate::model::{Grouping, LayerId};

/// The file that says what a folder was made of: what was handed to
/// [`Writer::finish`](super::Writer::finish), the
/// [`WritePlan`] as `plan`, and the size and SHA-256 of every other file as `files`.
pub const MANIFEST: &str = "mcsmoe.json";

/// What kind of folder to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Export {
    /// `M` experts in every layer and a router of `M` rows: loads in unmodified runtimes. Needs
    /// the same `M` everywhere and [`MergedLayer::narrowed`](crate::model::MergedLayer::narrowed).
    Stock,
    /// `M` experts, any number per layer, the `N`-row router and the expert map in `config.json`:
    /// exact, for runtimes that know the map. Others refuse the model type.
    Native,
    /// `N` experts, each a copy of its group's: exact in unmodified runtimes, saves nothing.
    Expanded,
}

/// What to write.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WritePlan {
    /// The kind of folder.
    pub export: Export,
    /// The merged layers; MoE layers that are not named here are copied.
    pub groupings: BTreeMap<LayerId, Grouping>,
    /// A lower number of experts per token.
    pub top_k: Option<usize>,
    /// Whether to give up group-limited routing (`n_group = topk_group = 1`).
    pub flatten_groups: bool,
    /// Layers whose experts a native folder holds in factors, where every projection has a tensor
    /// of its own; elsewhere they are multiplied out.
    pub factored: BTreeMap<LayerId, Factoring>,
    /// The width of all experts when it is not that of the source: the hidden units that are left.
    /// Then every MoE layer is planned.
    pub d_ff: Option<usize>,
    /// The size above which a new file is begun.
    pub shard_bytes: u64,
    /// Writes these layers and nothing else, to be joined with the rest by
    /// [`Writer::take`](super::Writer::take); no
    /// runtime can load such a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<BTreeSet<LayerId>>,
}

impl WritePlan {
    /// A plan with the original top-k and routing groups and shards of 5 GB.
    pub fn new(export: Export, groupings: BTreeMap<LayerId, Grouping>) -> Self {
        let (top_k, flatten_groups, shard_bytes) = (None, false, 5_000_000_000);
        let (factored, d_ff, only) = (BTreeMap::new(), None, None);
        Self { export, groupings, top_k, flatten_groups, factored, d_ff, shard_bytes, only }
    }

    /// Whether multi-token-prediction layers are left out.
    pub(super) fn drops_mtp(&self) -> bool {
        let merged = self.groupings.values().any(|g| !g.is_identity());
        self.d_ff.is_some() || self.export != Export::Expanded && merged
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Names of all files, `mcsmoe.json` included.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters of all tensors.
    pub parameters: u64,
    /// Bytes of the experts of all MoE layers, shared ones excluded.
    pub expert_bytes: u64,
    /// Tensors of the source that were left out, each with the reason.
    pub dropped: Vec<(String, String)>,
}
