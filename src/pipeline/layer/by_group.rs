//! Align and merge, group by group, where no later step sees a whole layer at once.
//!
//! The members of a group are read, aligned, merged, handed on and dropped on one thread. What is
//! in memory is a group per thread, and every thread has something to do even when the model has
//! one layer only.

use crate::align;
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, ExpertView, Grouping, LayerId, Permutation, Router};
use crate::par;
use crate::pipeline::layer::merge::merge_members;
use crate::pipeline::layer::process::LayerDecision;
use crate::pipeline::layer::source::LayerSource;
use crate::pipeline::layer::stages::LayerStages;
use crate::pipeline::report::Kind;
use crate::stage::{Context, LayerView, Members};

/// Takes the experts of a layer, each as soon as it is merged.
pub(crate) trait ExpertSink: Sync {
    /// A layer begins.
    fn begin(
        &self,
        id: LayerId,
        grouping: &Grouping,
        router: &Router,
        narrowed: Option<&Router>,
    ) -> Result<()>;
    /// The expert of group `g`; groups come in order.
    fn expert(&self, id: LayerId, g: usize, expert: &Expert) -> Result<()>;
}

/// The experts of a layer that are read when their group is merged.
#[derive(Clone, Copy)]
pub(crate) struct ExpertsByGroup<'a> {
    pub(crate) source: &'a (dyn LayerSource + Sync),
    pub(crate) sink: &'a dyn ExpertSink,
}

impl ExpertsByGroup<'_> {
    /// Merges all groups and hands each expert on; what kind they are of.
    pub(crate) fn merge(
        &self,
        view: &LayerView<'_>,
        decision: &LayerDecision,
        stages: &LayerStages<'_>,
        cx: &Context,
    ) -> Result<Kind> {
        let inner = cx.per_task();
        let kinds = par::in_turn(decision.grouping.groups(), |g| {
            let merged = self.merge_group(view, g, decision, stages, &inner)?;
            self.sink.expert(view.id, g, &merged)?;
            Ok(Kind::of(&merged))
        })?;
        self.source.release(view.id);
        let Some(&kind) = kinds.first() else {
            return Err(Error::range("groups", "at least one", 0));
        };
        match kinds.iter().find(|other| **other != kind) {
            None => Ok(kind),
            Some(other) => {
                Err(Error::shape("experts of one kind", kind.parameters, other.parameters))
            }
        }
    }

    /// The merged expert of group `g`; an expert that is alone stays as it is, bit for bit.
    fn merge_group(
        &self,
        view: &LayerView<'_>,
        g: usize,
        decision: &LayerDecision,
        stages: &LayerStages<'_>,
        cx: &Context,
    ) -> Result<Expert> {
        let indices = decision.grouping.members(g);
        let dominant = decision.grouping.dominants()[g];
        let read = |i: usize| self.source.expert(view.id, i);
        if let &[alone] = &indices[..] {
            return read(alone);
        }
        let experts = indices.iter().map(|&i| read(i)).collect::<Result<Vec<_>>>()?;
        let views: Vec<ExpertView<'_>> = experts.iter().map(Expert::view).collect();
        let permutations = self.align_group(view, g, &indices, &views, (decision, stages), cx);
        let permutations = permutations.in_expert(dominant)?;
        let members = Members {
            layer: *view,
            indices: &indices,
            dominant: indices.iter().position(|&i| i == dominant).unwrap_or(0),
            experts: &views,
            permutations: &permutations,
        };
        merge_members(stages.merger, &members, cx).in_expert(dominant)
    }

    fn align_group(
        &self,
        view: &LayerView<'_>,
        g: usize,
        indices: &[usize],
        experts: &[ExpertView<'_>],
        (decision, stages): (&LayerDecision, &LayerStages<'_>),
        cx: &Context,
    ) -> Result<Vec<Permutation>> {
        let LayerDecision { observed, grouping } = decision;
        if let Some(all) = &observed.permutations {
            return Ok(indices.iter().map(|&i| all[i].clone()).collect());
        }
        let Some(a) = stages.in_groups() else {
            return Ok(experts.iter().map(|e| Permutation::identity(e.d_ff())).collect());
        };
        let table = Some(&observed.summary.similarity);
        let frame = align::reference_of(a.reference, grouping, g, table)?;
        // The first expert of the layer may keep its order without being a member.
        let outside;
        let reference = match indices.iter().position(|&i| i == frame) {
            Some(position) => experts[position].reborrow(),
            None => {
                outside = self.source.expert(view.id, frame)?;
                outside.view()
            }
        };
        align::align_members(&a.aligner, (frame, reference), indices, experts, view, cx)
    }
}
