//! The stages that a layer passes, and where the samples come from on which it is recovered,
//! compressed and measured.

use std::collections::BTreeMap;

use crate::checkpoint::Factoring;
use crate::model::{LayerId, RoutingRule};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::observe::before_grouping;
use crate::pipeline::options::{AlignWhen, Alignment, RoutingGroupPolicy};
use crate::stage::{Compressor, Grouper, Merger, Needs, Recoverer, RouterMerger, Similarity};

/// What a size budget leaves of every matrix, layer by layer.
pub(crate) type Ranks = BTreeMap<LayerId, Factoring>;

/// The stages that every layer of a run passes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerStages<'a> {
    pub(crate) similarity: &'a dyn Similarity,
    pub(crate) grouper: &'a dyn Grouper,
    pub(crate) alignment: Option<&'a Alignment>,
    pub(crate) merger: &'a dyn Merger,
    pub(crate) router: Option<&'a dyn RouterMerger>,
    pub(crate) routing_groups: RoutingGroupPolicy,
    pub(crate) top_k: Option<usize>,
    /// What brings the merged layer back towards the original's output; needs samples.
    pub(crate) recoverer: Option<&'a dyn Recoverer>,
    /// What compresses the merged and recovered layer.
    pub(crate) compressor: Option<&'a dyn Compressor>,
    /// What a size budget leaves of the matrices.
    pub(crate) ranks: Option<&'a Ranks>,
    /// Whether the output error is measured where there are samples.
    pub(crate) measure_error: bool,
    /// Whether singular values are measured; `None` where it is cheap.
    pub(crate) measure_spectra: Option<bool>,
    pub(crate) samples: SampleOrigin,
}

/// Where inputs of a layer come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SampleOrigin {
    /// There are none.
    Nowhere,
    /// The statistics hold them.
    Statistics,
    /// A text that runs through the layers during the merge.
    Text,
}

impl<'a> LayerStages<'a> {
    pub(crate) fn of(pipeline: &'a Pipeline, samples: SampleOrigin) -> Self {
        Self {
            similarity: &*pipeline.similarity,
            grouper: &*pipeline.grouper,
            alignment: pipeline.alignment.as_ref(),
            merger: &*pipeline.merger,
            router: pipeline.router.as_deref(),
            routing_groups: pipeline.routing_groups,
            top_k: pipeline.top_k,
            recoverer: pipeline.recoverer.as_deref(),
            compressor: pipeline.compressor.as_deref(),
            ranks: None,
            measure_error: pipeline.measure_error,
            measure_spectra: pipeline.measure_spectra,
            samples,
        }
    }

    /// Under a size budget.
    pub(crate) fn with_ranks(self, ranks: Option<&'a Ranks>) -> Self {
        Self { ranks, ..self }
    }

    /// The same up to the merge; what comes after it is left out.
    pub(crate) fn merge_only(self) -> Self {
        Self {
            recoverer: None,
            compressor: None,
            measure_error: false,
            measure_spectra: Some(false),
            ..self
        }
    }

    /// Statistics that the first half of a layer reads.
    pub(crate) fn observe_needs(&self) -> Needs {
        let before = before_grouping(self.alignment);
        self.grouper.needs()
            | self.similarity.needs()
            | before.map_or(Needs::NONE, |a| a.aligner.needs() | Needs::EXPERTS)
    }

    /// Statistics that the second half reads.
    pub(crate) fn merge_needs(&self) -> Needs {
        let in_groups = self.in_groups();
        self.merger.needs()
            | self.router.map_or(Needs::NONE, |r| r.needs())
            | in_groups.map_or(Needs::NONE, |a| a.aligner.needs())
            | self.recoverer.map_or(Needs::NONE, |r| r.needs())
            | self.compressor.map_or(Needs::NONE, |c| c.needs())
            | if self.reads_samples() { Needs::SAMPLES } else { Needs::NONE }
    }

    fn reads_samples(&self) -> bool {
        let weighs = self.compressor.is_some_and(|c| c.uses_inputs());
        match self.samples {
            SampleOrigin::Nowhere => self.recoverer.is_some(),
            SampleOrigin::Statistics => self.recoverer.is_some() || self.measure_error || weighs,
            SampleOrigin::Text => false,
        }
    }

    /// The alignment, if it comes after grouping.
    pub(crate) fn in_groups(&self) -> Option<&'a Alignment> {
        self.alignment.filter(|a| a.when == AlignWhen::InGroups)
    }

    /// Whether no stage after grouping has to see a whole layer at once.
    pub(crate) fn works_by_group(&self) -> bool {
        let measures = self.measure_error && self.samples != SampleOrigin::Nowhere;
        !measures
            && self.measure_spectra != Some(true)
            && self.recoverer.is_none()
            && self.compressor.is_none()
            && !self.merge_needs().contains(Needs::EXPERTS)
    }

    /// Whether the layer's output is compared with the original's on samples in the statistics.
    pub(crate) fn compares_outputs(&self) -> bool {
        self.recoverer.is_some() || self.measure_error && self.samples == SampleOrigin::Statistics
    }

    /// The policy of a narrowed router.
    pub(crate) fn narrowed_rule(&self, rule: &RoutingRule) -> RoutingRule {
        let flatten = self.routing_groups == RoutingGroupPolicy::Flatten;
        RoutingRule {
            top_k: self.top_k.map_or(rule.top_k, |k| k.min(rule.top_k)),
            groups: rule.groups.filter(|g| !flatten && g.groups > 1),
            ..*rule
        }
    }
}

impl Pipeline {
    /// The statistics that a run needs, over all stages.
    pub fn needs(&self) -> Needs {
        let stages = LayerStages::of(self, SampleOrigin::Nowhere);
        stages.observe_needs() | stages.merge_needs()
    }

    /// What a run on text collects. Recovery and compression follow the text themselves; without
    /// them samples are what errors are measured on.
    pub(crate) fn needs_along_text(&self) -> Needs {
        let along = self.recoverer.is_some();
        let origin = if along { SampleOrigin::Text } else { SampleOrigin::Statistics };
        let stages = LayerStages::of(self, origin);
        // A size budget weighs the matrices of all layers before the first is merged.
        let weighs = self.size_budget().is_some();
        let samples = if weighs { Needs::SAMPLES } else { Needs::NONE };
        stages.observe_needs() | stages.merge_needs() | samples
    }
}
