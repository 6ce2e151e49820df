//! A target size, and the ranks that meet it.
//!
//! The spectra of all merged matrices have to be known before one of them is decomposed, so that a
//! size budget costs a pass of its own: every layer is merged as in the second pass, looked at, and
//! dropped. Recoverers do not run in it: they move weights little and cost the most.

use std::collections::BTreeMap;

use crate::checkpoint::{Checkpoint, Factoring, WritePlan};
use crate::decompose::allocate_bytes;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Expert, LayerId, MoeLayer};
use crate::pipeline::layer::process::{
    Decision, Experts, LayerDecision, LayerInput, process_layer,
};
use crate::pipeline::layer::source::LayerSource;
use crate::pipeline::layer::stages::{LayerStages, Ranks, SampleOrigin};
use crate::pipeline::progress::{LayerProgress, Observer, Phase, Silent};
use crate::pipeline::run::decisions::Decisions;
use crate::stage::{Compression, Compressor, Context, Needs, Portion, SizeBudget, Spectrum};

/// What a budget has to spend, and what is spent already.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SizeAccount {
    /// Bytes of the target, or of its experts.
    target: u64,
    /// Of these, what no rank changes: other tensors, protected layers, biases.
    fixed: u64,
    /// Bytes of a number, for each matrix of each merged expert.
    value_bytes: BTreeMap<LayerId, Vec<Vec<usize>>>,
}

impl SizeAccount {
    /// In a native folder, whose plan has no factors yet.
    pub(crate) fn of_folder(
        budget: &SizeBudget,
        source: &Checkpoint,
        plan: &WritePlan,
    ) -> Result<Self> {
        if !source.can_hold_factors() {
            let kind = ErrorKind::Unsupported {
                what: "layout for a size budget",
                found: source.layout().into(),
                supported: "layouts with a tensor for every projection; others hold no factors"
                    .into(),
            };
            return Err(kind.into());
        }
        let sizes = plan.sizes(source)?;
        let mut matrices = 0;
        for (id, experts) in &sizes.value_bytes {
            let info = source.layer(*id)?;
            let values: usize = experts.iter().flatten().sum();
            matrices += (values * info.d_ff * info.d_model) as u64;
        }
        let (whole, written) = match budget.of {
            Portion::Experts => {
                (source.layers().iter().map(|l| l.expert_bytes).sum(), sizes.expert_bytes)
            }
            Portion::Model => (source.total_bytes(), sizes.bytes),
        };
        let (target, fixed) = (budget.bytes(whole), written - matrices);
        Ok(Self { target, fixed, value_bytes: sizes.value_bytes })
    }

    /// In memory, where every number takes four bytes and the experts are all there is.
    pub(crate) fn of_layers(
        budget: &SizeBudget,
        layers: &[MoeLayer],
        decisions: &Decisions,
    ) -> Result<Self> {
        if budget.of == Portion::Model {
            let reason = "a size of the whole model needs the whole model: give one of the experts";
            return Err(ErrorKind::Recipe { reason: reason.into() }.into());
        }
        const EACH: usize = size_of::<f32>();
        let numbers = |expert: &Expert| expert.parameters() * EACH;
        let whole: usize = layers.iter().flat_map(|l| l.experts()).map(numbers).sum();
        let (mut fixed, mut value_bytes) = (0, BTreeMap::new());
        for layer in layers {
            let one = &layer.experts()[0];
            let Some(decision) = decisions.layers.iter().find(|d| d.id() == layer.id()) else {
                fixed += layer.experts().iter().map(numbers).sum::<usize>();
                continue;
            };
            let groups = decision.grouping.groups();
            let dense: usize = one.view().linears().map(|(_, l)| l.weight.len() * EACH).sum();
            fixed += groups * (numbers(one) - dense);
            value_bytes.insert(layer.id(), vec![vec![EACH; one.view().linears().count()]; groups]);
        }
        let (target, fixed) = (budget.bytes(whole as u64), fixed as u64);
        Ok(Self { target, fixed, value_bytes })
    }
}

impl SizeAccount {
    /// The pass of its own: merges every decided layer, surveys it, and allocates.
    pub(crate) fn ranks(
        &self,
        stages: &LayerStages<'_>,
        source: &dyn LayerSource,
        decisions: &Decisions,
        observer: &dyn Observer,
        cx: &Context,
    ) -> Result<Ranks> {
        let missing = || Error::range("size budget", "a compressor that has one", "none");
        let compressor = stages.compressor.ok_or_else(missing)?;
        let budget = compressor.size_budget().ok_or_else(missing)?;
        let total = decisions.layers.len();
        let mut surveyed = Vec::new();
        for (done, decision) in decisions.layers.iter().enumerate() {
            let layer = decision.id();
            LayerProgress { observer, layer, done, total }.started(Phase::Budget);
            let spectra = survey(compressor, decision, stages, source, cx);
            let priced = spectra.and_then(|spectra| self.priced(compressor, layer, spectra));
            surveyed.push((layer, priced.in_layer(layer)?));
        }
        let kept = allocate_bytes(surveyed, (self.target, self.fixed), budget.least_rank)?;
        Ok(kept.into_iter().map(|(id, experts)| (id, Factoring::new(experts))).collect())
    }
}

/// The spectra of a layer's matrices after merging.
fn survey(
    compressor: &dyn Compressor,
    decision: &LayerDecision,
    stages: &LayerStages<'_>,
    source: &dyn LayerSource,
    cx: &Context,
) -> Result<Vec<Vec<Spectrum>>> {
    let (layer, merge_only) = (decision.id(), stages.merge_only());
    let weighs = stages.samples == SampleOrigin::Statistics && compressor.uses_inputs();
    let samples = if weighs { Needs::SAMPLES } else { Needs::NONE };
    let stats = source.stats(layer, merge_only.merge_needs() | samples)?;
    let input = LayerInput {
        experts: Experts::InMemory(source.layer(layer)?),
        stats: stats.clone(),
        samples: None,
        progress: LayerProgress { observer: &Silent, layer, done: 0, total: 1 },
    };
    let merged = process_layer(input, Decision::Made(decision), &merge_only, cx)?;
    let (merged, _) = merged.in_memory()?;
    source.release(layer);
    let task = Compression {
        inputs: stats.samples.as_ref().map(|s| s.inputs.view()),
        narrowed: stages.router.is_some(),
        usage: &decision.observed.usage(&decision.grouping),
        ..Compression::default()
    };
    compressor.survey(&merged, &task, cx)
}

impl SizeAccount {
    /// The spectra of a layer with the bytes of a number in each of its matrices.
    fn priced(
        &self,
        compressor: &dyn Compressor,
        id: LayerId,
        mut spectra: Vec<Vec<Spectrum>>,
    ) -> Result<Vec<Vec<Spectrum>>> {
        let lost = || Error::range("layer", "one of the planned target", id);
        let bytes = self.value_bytes.get(&id).ok_or_else(lost)?;
        let counts = |lengths: Vec<usize>| format!("matrices of the experts: {lengths:?}");
        let expected = counts(bytes.iter().map(Vec::len).collect());
        let found = counts(spectra.iter().map(Vec::len).collect());
        if found != expected {
            let what = format!("survey of compressor `{}`", compressor.name());
            return Err(Error::range(what, expected, found));
        }
        for (spectrum, bytes) in spectra.iter_mut().flatten().zip(bytes.iter().flatten()) {
            spectrum.unit = *bytes;
        }
        Ok(spectra)
    }
}
