//! What a run writes, and the plan of the folder that follows from the groups.

use std::collections::BTreeMap;

use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, Export, Factoring, WritePlan, Written};
use crate::error::{Locate, Result};
use crate::model::{Grouping, LayerId};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::stages::Ranks;
use crate::pipeline::options::RoutingGroupPolicy;
use crate::pipeline::provenance::{CalibrationReport, HashedFile, TEXT_KEY};
use crate::pipeline::recipe::ExportChoice;
use crate::pipeline::report::{Change, CompressionReport, LayerReport, Report, WrittenReport};
use crate::pipeline::run::resume::fingerprint;
use crate::stage::{ExpertStorage, Stage};

/// What [`Run::write`](crate::pipeline::Run::write) writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The kind of folder.
    pub export: ExportChoice,
    /// Largest size of a file, in bytes.
    pub shard_bytes: u64,
    /// Bytes of hidden states of text that are held in memory; above, they go to a scratch file in
    /// the partial folder.
    pub memory: u64,
    /// Goes on from the last layer that an interrupted run has written, if there was one, and
    /// leaves the partial folder after a failure, if statistics or a layer lie in it. The target
    /// has the bytes of an undisturbed run. Refused when source, statistics or text, recipe or
    /// export are not those of that run. A run that follows a text layer by layer keeps the hidden
    /// states behind its last three layers in the partial folder for that: `12 t d_model` bytes,
    /// as much again for what a recoverer follows, and twice that in an encoder-decoder model.
    pub resume: bool,
}

impl Default for Output {
    /// A stock folder.
    fn default() -> Self {
        Self::new(ExportChoice::Stock)
    }
}

impl Output {
    /// A folder of one kind, in files of at most 5 GB; a partial folder is in the way.
    pub fn new(export: ExportChoice) -> Self {
        Self { export, shard_bytes: 5_000_000_000, memory: 2 << 30, resume: false }
    }

    /// The same, but going on from an interrupted run.
    #[must_use]
    pub fn resuming(self) -> Self {
        Self { resume: true, ..self }
    }
}

/// What to write for some groups. What a size budget leaves of each matrix depends on the
/// weights and is not yet in it.
pub(crate) fn write_plan(
    pipeline: &Pipeline,
    source: &Checkpoint,
    output: &Output,
    groupings: BTreeMap<LayerId, Grouping>,
) -> Result<WritePlan> {
    let mut plan = WritePlan {
        export: output.export.into(),
        groupings,
        top_k: pipeline.top_k,
        flatten_groups: pipeline.routing_groups == RoutingGroupPolicy::Flatten,
        factored: BTreeMap::new(),
        d_ff: None,
        shard_bytes: output.shard_bytes,
        only: None,
    };
    if pipeline.size_budget().is_none() {
        plan_factors(pipeline, source, &mut plan, None)?;
    }
    Ok(plan)
}

/// Writes the compressor's factors into the plan.
pub(crate) fn plan_factors(
    pipeline: &Pipeline,
    source: &Checkpoint,
    plan: &mut WritePlan,
    ranks: Option<&Ranks>,
) -> Result<()> {
    let Some(compressor) = &pipeline.compressor else { return Ok(()) };
    for layer in source.layers() {
        let Some(grouping) = plan.groupings.get(&layer.id) else { continue };
        let (groups, dim) = (grouping.groups(), (layer.d_ff, layer.d_model));
        let storage = compressor.storage(dim).in_layer(layer.id)?;
        let same = storage.matrices(layer.gated);
        let same = same.map(|kept| Factoring::new(vec![kept; groups]));
        let allocated = ranks.and_then(|ranks| ranks.get(&layer.id)).cloned();
        if let Some(kept) = same.or(allocated) {
            plan.factored.insert(layer.id, kept);
        }
        if let ExpertStorage::HiddenUnits(units) = storage {
            plan.d_ff = Some(units);
        }
    }
    Ok(())
}

/// What the report tells of the written folder.
pub(crate) fn written_report(
    source: &Checkpoint,
    plan: &WritePlan,
    written: Written,
) -> WrittenReport {
    let expert_bytes = source.layers().iter().map(|l| l.expert_bytes).sum();
    WrittenReport {
        export: match plan.export {
            Export::Stock => "stock",
            Export::Native => "native",
            Export::Expanded => "expanded",
        }
        .into(),
        tensor_bytes: Change { before: source.total_bytes(), after: written.bytes },
        expert_bytes: Change { before: expert_bytes, after: written.expert_bytes },
        parameters: Change { before: source.total_parameters(), after: written.parameters },
        dropped: written.dropped,
    }
}

/// The report of a run of `pipeline`, without what only a written folder has.
pub(crate) fn run_report(pipeline: &Pipeline, layers: Vec<LayerReport>) -> Report {
    let name = |kind: &str, stage: &dyn Stage| format!("{kind} {}", stage.name());
    let mut stages = vec![name("similarity", &pipeline.similarity)];
    if let Some(a) = &pipeline.alignment {
        stages.push(name("align", &a.aligner));
    }
    stages.push(name("group", &pipeline.grouper));
    stages.push(name("merge", &pipeline.merger));
    if let Some(router) = &pipeline.router {
        stages.push(name("router", router));
    }
    if let Some(recoverer) = &pipeline.recoverer {
        stages.push(name("recover", recoverer));
    }
    if let Some(compressor) = &pipeline.compressor {
        stages.push(format!("compress {}", compressor.name()));
    }
    Report {
        mcsmoe_version: env!("CARGO_PKG_VERSION").into(),
        family: None,
        recipe: pipeline.recipe.clone(),
        stages,
        device: pipeline.cx.compute().name().into(),
        factorise: pipeline.cx.backend().name().into(),
        seed: pipeline.cx.seed(),
        tokens: 0,
        calibration: None,
        experts: Report::total(&layers, |l| l.experts),
        expert_parameters: Report::total(&layers, |l| l.expert_parameters),
        flops_per_token: Report::total(&layers, |l| l.flops_per_token),
        compression: CompressionReport::total(&layers),
        written: None,
        layers,
    }
}

/// What is known of the text behind a statistics file.
pub(crate) fn provenance_of(stats: &StatsFile) -> Result<CalibrationReport> {
    let name = stats.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let statistics = Some(HashedFile { name, sha256: fingerprint::of_file(stats.path())? });
    // Files of other programs may have another entry of this name.
    let text = stats.metadata(TEXT_KEY).and_then(|json| serde_json::from_str(json).ok());
    Ok(CalibrationReport { statistics, text })
}
