//! A budget: how many experts may remain, and which must.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::layer::LayerId;

/// The number of experts to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The same number in every merged layer.
    PerLayer(usize),
    /// This many over all merged layers together; protected layers are not counted.
    Total(usize),
}

/// A target and its constraints.
///
/// Protected layers are not handed to groupers at all; `min_per_layer` is `k` where a narrowed
/// router must still find `k` experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// How many experts to keep.
    pub target: Target,
    /// Least number of groups in any layer; at least 1.
    pub min_per_layer: usize,
    /// Largest number of members of a group.
    pub group_capacity: Option<usize>,
    /// Experts that must stay alone, per layer.
    pub protected: BTreeMap<LayerId, BTreeSet<usize>>,
}

impl Budget {
    /// A bare target.
    pub fn new(target: Target) -> Self {
        Self { target, min_per_layer: 1, group_capacity: None, protected: BTreeMap::new() }
    }

    /// Whether expert `i` of `layer` must stay alone.
    pub fn is_protected(&self, layer: LayerId, i: usize) -> bool {
        self.protected.get(&layer).is_some_and(|experts| experts.contains(&i))
    }

    /// Number of protected experts of `layer`.
    pub fn protected_in(&self, layer: LayerId) -> usize {
        self.protected.get(&layer).map_or(0, BTreeSet::len)
    }
}
