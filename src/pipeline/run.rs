//! From one folder to another.

use std::path::Path;

use super::builder::Pipeline;
use super::engine::Source;
use super::observe::{Observer, Silent};
use super::policy::{LayerShape, RoutingGroupPolicy};
use super::recipe::{ExportChoice, Recipe};
use super::report::{Change, Report, WrittenReport};
use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, Export, LayerInfo, WritePlan, Writer, Written};
use crate::error::{ErrorKind, Locate, Result};
use crate::model::{LayerId, MoeLayer, Router, RoutingStats};
use crate::stage::Needs;

/// Merges the experts of the checkpoint in `source` as `recipe` says, by the routing statistics in
/// the file `stats`, and writes a new folder `target`.
///
/// One layer is in memory at a time. The target appears whole or not at all: everything is written
/// beside it and renamed at the end.
///
/// # Errors
/// Before any weight is read: an unreadable or unsupported checkpoint, statistics of another model
/// or without what a stage needs, a budget that cannot be met, a target that is in the way. Later:
/// non-finite weights, a full disk. Each names file, tensor, layer and expert where they are known.
///
/// # Example
/// ```no_run
/// use std::path::Path;
/// use mcsmoe::pipeline::{Keep, Recipe, merge_then_compress};
///
/// let recipe = Recipe::preset("m-smoe", Keep::Experts(4))?;
/// let (source, stats) = (Path::new("mixtral"), Path::new("mixtral.stats.safetensors"));
/// let report = merge_then_compress(source, stats, &recipe, Path::new("mixtral-4e"))?;
/// println!("{:.0}% of the expert parameters saved", 100.0 * report.expert_parameters.saved());
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn merge_then_compress(
    source: &Path,
    stats: &Path,
    recipe: &Recipe,
    target: &Path,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(source)?;
    let stats = StatsFile::open(stats)?;
    let output = Output { export: recipe.export, shard_bytes: recipe.shard_bytes };
    let pipeline = recipe.builder()?.build()?;
    pipeline.run_checkpoint(&checkpoint, &stats, target, &output, &Silent)
}

/// What [`Pipeline::run_checkpoint`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The kind of folder.
    pub export: ExportChoice,
    /// Largest size of a file, in bytes.
    pub shard_bytes: u64,
}

impl Output {
    /// A folder of one kind, in files of at most 5 GB.
    pub fn new(export: ExportChoice) -> Self {
        Self { export, shard_bytes: 5_000_000_000 }
    }
}

impl Pipeline {
    /// Merges a checkpoint, one layer in memory at a time; see [`merge_then_compress`].
    ///
    /// # Errors
    /// As [`merge_then_compress`]; [`ErrorKind::Recipe`] when the export needs a narrowed router
    /// and the pipeline has none, or the other way round.
    pub fn run_checkpoint(
        &self,
        source: &Checkpoint,
        stats: &StatsFile,
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        self.check_export(output.export)?;
        let shapes: Vec<LayerShape> = source.layers().iter().map(shape).collect();
        let (active, _) = self.checked(&shapes)?;
        let ids: Vec<LayerId> = active.iter().map(|s| s.id).collect();
        self.check_stats(source, stats, &ids)?;
        let samples = ids.iter().all(|id| stats.available(id).contains(Needs::SAMPLES));
        let folder = Folder { source, stats };
        let decided = self.decide(&folder, &shapes, observer)?;
        let plan = WritePlan {
            export: output.export.into(),
            groupings: decided.ids.iter().copied().zip(decided.groupings.clone()).collect(),
            top_k: self.top_k,
            flatten_groups: self.routing_groups == RoutingGroupPolicy::Flatten,
            shard_bytes: output.shard_bytes,
        };
        let mut writer = Writer::create(source, target, &plan)?;
        let layers =
            self.merge(&folder, &decided, samples, observer, &mut |layer| writer.layer(&layer))?;
        let mut report = self.report(layers);
        report.family = Some(source.family().into());
        report.tokens = stats.tokens();
        let json = serde_json::to_value(&report).unwrap_or_default();
        let written = writer.finish(&json)?;
        report.written = Some(summary(source, &plan, written));
        observer.finished(&report);
        Ok(report)
    }

    fn check_export(&self, export: ExportChoice) -> Result<()> {
        let reason = match (export, self.router.is_some()) {
            (ExportChoice::Stock, false) => "a stock export needs a router stage",
            (ExportChoice::Native | ExportChoice::Expanded, true) => {
                "native and expanded exports keep the router: leave the router stage out"
            }
            _ => return Ok(()),
        };
        Err(ErrorKind::Recipe { reason: reason.into() }.into())
    }

    /// Every stage's needs against what the file holds, before any weight is read.
    fn check_stats(&self, source: &Checkpoint, stats: &StatsFile, ids: &[LayerId]) -> Result<()> {
        for id in ids {
            if !stats.layers().contains(id) {
                let known: Vec<String> = stats.layers().iter().map(ToString::to_string).collect();
                let reason = format!("no statistics of {id}; the file has {}", known.join(", "));
                return Err(ErrorKind::Statistics { reason }.into());
            }
            let expected = source.layer(*id)?.experts;
            let found = stats.experts(id).unwrap_or(expected);
            if found != expected {
                let reason = format!("{found} experts where the model has {expected}");
                return Err(ErrorKind::Statistics { reason }.into()).in_layer(id);
            }
            let given = stats.available(id) | Needs::EXPERTS;
            let missing: Vec<_> = self.needs().without(given).names().collect();
            if !missing.is_empty() {
                let remedy = "collect them, or choose stages that need less".into();
                let kind = ErrorKind::Missing {
                    stage: "the recipe".into(),
                    needs: missing.join(", "),
                    remedy,
                };
                return Err(kind.into()).in_layer(id);
            }
        }
        Ok(())
    }
}

fn shape(info: &LayerInfo) -> LayerShape {
    LayerShape { id: info.id, experts: info.experts, rule: info.rule }
}

fn summary(source: &Checkpoint, plan: &WritePlan, written: Written) -> WrittenReport {
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

struct Folder<'a> {
    source: &'a Checkpoint,
    stats: &'a StatsFile,
}

impl Source for Folder<'_> {
    fn router(&self, id: LayerId) -> Result<Router> {
        self.source.read_router(id)
    }

    fn layer(&self, id: LayerId) -> Result<MoeLayer> {
        self.source.read_layer(id)
    }

    fn stats(&self, id: LayerId, needs: Needs) -> Result<RoutingStats> {
        self.stats.layer(&id, needs)
    }

    fn release(&self, id: LayerId) {
        self.source.release(id);
    }
}
