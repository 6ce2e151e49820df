//! Where layers and their statistics come from: a checkpoint, or memory.

use crate::calibrate::StatsFile;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Expert, LayerId, MoeLayer, Router, RoutingStats};
use crate::stage::Needs;

/// Where layers and their statistics come from.
pub(crate) trait LayerSource {
    /// The layer's router, without its experts.
    fn router(&self, id: LayerId) -> Result<Router>;
    /// The whole layer.
    fn layer(&self, id: LayerId) -> Result<MoeLayer>;
    /// One expert.
    fn expert(&self, id: LayerId, i: usize) -> Result<Expert>;
    /// The statistics that `needs` asks for.
    fn stats(&self, id: LayerId, needs: Needs) -> Result<RoutingStats>;
    /// The layer is not needed for now.
    fn release(&self, _id: LayerId) {}
}

/// Layers of a checkpoint, with the statistics of a file.
#[derive(Clone, Copy)]
pub(crate) struct CheckpointLayers<'a> {
    pub(crate) source: &'a Checkpoint,
    pub(crate) stats: &'a StatsFile,
}

impl LayerSource for CheckpointLayers<'_> {
    fn router(&self, id: LayerId) -> Result<Router> {
        self.source.read_router(id)
    }

    fn layer(&self, id: LayerId) -> Result<MoeLayer> {
        self.source.read_layer(id)
    }

    fn expert(&self, id: LayerId, i: usize) -> Result<Expert> {
        self.source.read_expert(id, i)
    }

    fn stats(&self, id: LayerId, needs: Needs) -> Result<RoutingStats> {
        self.stats.layer(&id, needs)
    }

    fn release(&self, id: LayerId) {
        self.source.release(id);
    }
}

/// Layers and statistics that the caller holds: `stats[i]` belongs to `layers[i]`.
#[derive(Clone, Copy)]
pub(crate) struct MemoryLayers<'a> {
    layers: &'a [MoeLayer],
    stats: &'a [RoutingStats],
}

impl<'a> MemoryLayers<'a> {
    pub(crate) fn new(layers: &'a [MoeLayer], stats: &'a [RoutingStats]) -> Result<Self> {
        if layers.len() != stats.len() {
            let reason = format!("{} layers, {} statistics", layers.len(), stats.len());
            return Err(ErrorKind::Statistics { reason }.into());
        }
        Ok(Self { layers, stats })
    }

    fn position(&self, id: LayerId) -> Result<usize> {
        let found = self.layers.iter().position(|l| l.id() == id);
        found.ok_or_else(|| Error::range("layer", "one of the layers given", id))
    }
}

impl LayerSource for MemoryLayers<'_> {
    fn router(&self, id: LayerId) -> Result<Router> {
        Ok(self.layers[self.position(id)?].router().clone())
    }

    fn layer(&self, id: LayerId) -> Result<MoeLayer> {
        Ok(self.layers[self.position(id)?].clone())
    }

    fn expert(&self, id: LayerId, i: usize) -> Result<Expert> {
        let experts = self.layers[self.position(id)?].experts();
        let missing = || Error::range("expert", format!("below {}", experts.len()), i);
        experts.get(i).cloned().ok_or_else(missing)
    }

    fn stats(&self, id: LayerId, _needs: Needs) -> Result<RoutingStats> {
        Ok(self.stats[self.position(id)?].clone())
    }
}
