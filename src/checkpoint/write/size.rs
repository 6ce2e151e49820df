//! How large a target will be, before anything of it is written.

use std::collections::{BTreeMap, BTreeSet};

use super::layout_plan::Plan;
use super::request::WritePlan;
use crate::checkpoint::layout::{LayerTensors, Projection, is_index};
use crate::checkpoint::read::Checkpoint;
use crate::error::Result;
use crate::model::LayerId;

/// The size of a planned target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes of the experts of all MoE layers, shared ones excluded.
    pub expert_bytes: u64,
    /// For every planned layer the bytes of a number, for each of its experts' matrices: gate (if
    /// any), up, down.
    pub value_bytes: BTreeMap<LayerId, Vec<Vec<usize>>>,
}

impl WritePlan {
    /// The size of the target, which is known before a weight is read.
    ///
    /// # Errors
    /// Those of [`Writer::create`](crate::checkpoint::Writer::create) that come from the plan.
    pub fn sizes(&self, source: &Checkpoint) -> Result<Sizes> {
        let plan = Plan::new(source, self)?;
        let width = |tensor: usize| plan.outs[tensor].dtype.alignment();
        let values = |layer: &LayerTensors| -> Vec<Vec<usize>> {
            let of_one =
                |expert: &Vec<Projection>| expert.iter().map(|p| width(p.weight.tensor)).collect();
            layer.experts.iter().map(of_one).collect()
        };
        Ok(Sizes {
            bytes: plan.bytes(),
            expert_bytes: plan.expert_bytes(source),
            value_bytes: plan.layers.iter().map(|(id, layer)| (*id, values(layer))).collect(),
        })
    }
}

impl Plan {
    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.outs.iter().map(|o| o.bytes as u64).sum()
    }

    /// Parameters of all tensors; the numbers of kept rows are none.
    pub(super) fn parameters(&self) -> u64 {
        let weights = self.outs.iter().filter(|o| !is_index(&o.name));
        weights.map(|o| o.shape.iter().product::<usize>() as u64).sum()
    }

    /// Bytes of all experts, those of layers that are copied included.
    pub(super) fn expert_bytes(&self, source: &Checkpoint) -> u64 {
        let bytes = |t: &usize| self.outs[*t].bytes as u64;
        let of_layer = |layer: &LayerTensors| layer.expert_tensors().iter().map(bytes).sum::<u64>();
        let merged: u64 = self.layers.values().map(of_layer).sum();
        let others = source.tensors.iter().filter(|l| !self.layers.contains_key(&l.id));
        let copied: BTreeSet<usize> = others.flat_map(LayerTensors::expert_tensors).collect();
        let copied = self.outs.iter().filter(|o| o.copies.is_some_and(|t| copied.contains(&t)));
        merged + copied.map(|o| o.bytes as u64).sum::<u64>()
    }
}
