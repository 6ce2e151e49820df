//! A run in pieces, for several machines: once statistics exist, layers are independent.
//!
//! Every process decides for all layers, which is deterministic, then merges and writes its own
//! into a folder of safetensors files with a partial manifest.
//! [`Run::assemble`](crate::pipeline::Run::assemble) joins the folders; the target has the bytes
//! that one process would have written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, MANIFEST, Part, Writer, read_json};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Grouping, LayerId};
use crate::pipeline::activations::calibration::CalibrationData;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::source::CheckpointLayers;
use crate::pipeline::progress::Observer;
use crate::pipeline::report::{LayerReport, Report, to_value};
use crate::pipeline::run::CheckpointRun;
use crate::pipeline::run::decisions::Decisions;
use crate::pipeline::run::output::{Output, write_plan};
use crate::pipeline::run::resume::fingerprint::Fingerprint;
use crate::pipeline::run::resume::journal::{Journal, Line};
use crate::pipeline::run::two_pass::{SecondPass, TwoPass};

/// What a part's manifest holds beside the write plan and the hashes of its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartReport {
    run: Fingerprint,
    groups: Vec<(LayerId, Grouping)>,
    layers: Vec<(LayerReport, String)>,
}

impl PartReport {
    /// The layers that lie in the part.
    pub fn layers(&self) -> impl Iterator<Item = &LayerReport> {
        self.layers.iter().map(|(report, _)| report)
    }

    fn read(folder: &Path) -> Result<Self> {
        read_json(&folder.join(MANIFEST), "read manifest", "part")
    }
}

/// A run in parts on statistics.
pub(crate) struct Distributed<'a> {
    run: CheckpointRun<'a>,
    stats: &'a StatsFile,
    print: Fingerprint,
}

impl<'a> Distributed<'a> {
    /// Checks what a run in one process checks, and that layers do not depend on each other.
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        (source, target): (&'a Checkpoint, &'a Path),
        stats: &'a StatsFile,
        output: &'a Output,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        if pipeline.size_budget().is_some() {
            let reason = "a size budget is spent over all layers at once: run it in one process";
            return Err(ErrorKind::Recipe { reason: reason.into() }.into());
        }
        let given = CalibrationData::Statistics(stats);
        let run = CheckpointRun::new(pipeline, (source, target), given, output, observer)?;
        let print = Fingerprint::of(pipeline, source, given, output)?;
        Ok(Self { run, stats, print })
    }

    /// Processes the layers at the positions `layers` and writes them into the target folder.
    pub(crate) fn run(&self, layers: Range<usize>) -> Result<PartReport> {
        let CheckpointRun { pipeline, source, target, output, observer, .. } = self.run;
        let (shapes, ids) = (&self.run.shapes, &self.run.ids);
        if layers.is_empty() || layers.end > shapes.len() {
            let found = format!("{}..{}", layers.start, layers.end);
            return Err(Error::range("layers", format!("within 0..{}", shapes.len()), found));
        }
        let own: Vec<LayerId> = shapes[layers].iter().map(|shape| shape.id).collect();
        if !own.iter().any(|id| ids.contains(id)) {
            return Err(Error::range("layers", "at least one that is merged", "protected ones"));
        }
        if output.resume && target.join(MANIFEST).exists() {
            return self.existing(target, &own);
        }
        let partial = self.run.begin(target)?;
        clear(partial.path())?;
        let layers = CheckpointLayers { source, stats: self.stats };
        let mut decisions = Decisions::make(pipeline, &layers, shapes, observer)?;
        let groups = decisions.groups();
        let mut plan = write_plan(pipeline, source, output, groups.iter().cloned().collect())?;
        plan.only = Some(own.iter().copied().filter(|id| ids.contains(id)).collect());
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut written = Vec::new();
        let record = &mut |report: &LayerReport, digest| {
            written.push((report.clone(), digest));
            Ok(())
        };
        decisions.layers.retain(|layer| own.contains(&layer.id()));
        let second = SecondPass::of(&self.run, self.run.sample_origin(self.stats));
        let pass = TwoPass::new(&self.run, self.stats, None, second);
        pass.process(&decisions, None, &mut writer, record)?;
        let report = PartReport { run: self.print.clone(), groups, layers: written };
        writer.finish(&to_value("part", &report)?)?;
        Ok(report)
    }

    /// A part that is there already.
    fn existing(&self, folder: &Path, own: &[LayerId]) -> Result<PartReport> {
        let found = PartReport::read(folder)?;
        found.check(&self.print).in_file(folder)?;
        let other = found.layers().find(|layer| !own.contains(&layer.layer));
        match other {
            None => Ok(found),
            Some(layer) => {
                let reason = format!("it holds {}, which is not asked for", layer.layer);
                Err(ErrorKind::Target { reason }.into()).in_file(folder)
            }
        }
    }

    /// Joins the folders of parts into the target.
    pub(crate) fn assemble(&self, parts: &[PathBuf]) -> Result<Report> {
        let CheckpointRun { pipeline, source, target, output, observer, .. } = self.run;
        let ids = &self.run.ids;
        let (groups, mut found) = gather(parts, &self.print)?;
        let missing: Vec<String> =
            ids.iter().filter(|id| !found.contains_key(id)).map(LayerId::to_string).collect();
        if !missing.is_empty() {
            let reason = format!("no part holds {}", missing.join(", "));
            return Err(ErrorKind::Target { reason }.into()).in_file(target);
        }
        let partial = self.run.begin(target)?;
        let mut journal = Journal::open(partial.path(), &self.print)?;
        journal.write(&Line::Groups(groups.clone()))?;
        let plan = write_plan(pipeline, source, output, groups.into_iter().collect())?;
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut reports = BTreeMap::new();
        for id in ids.iter().copied() {
            let Some(PartLayer { folder, report, digest }) = found.remove(&id) else { continue };
            writer.take(id, &Part::open(&folder)?, &digest)?;
            journal.write(&Line::Layer(Box::new(report.clone()), digest))?;
            observer.layer_finished(&report);
            reports.insert(id, report);
        }
        self.run.finish(&plan, reports, (writer, journal), self.stats.tokens())
    }
}

/// Removes what an interrupted process left of a part, which may have been of other layers.
fn clear(folder: &Path) -> Result<()> {
    let io = |e| Error::io("clear partial folder", e);
    for entry in std::fs::read_dir(folder).map_err(io).in_file(folder)? {
        let path = entry.map_err(io).in_file(folder)?.path();
        std::fs::remove_file(&path).map_err(io).in_file(&path)?;
    }
    Ok(())
}

/// A layer that lies in a part.
struct PartLayer {
    folder: PathBuf,
    report: LayerReport,
    digest: String,
}

/// Layers that lie in parts.
type PartLayers = BTreeMap<LayerId, PartLayer>;

/// What the parts hold, each layer once.
fn gather(parts: &[PathBuf], run: &Fingerprint) -> Result<(Vec<(LayerId, Grouping)>, PartLayers)> {
    let refuse = |reason: String, folder: &Path| -> Result<()> {
        Err(ErrorKind::Target { reason }.into()).in_file(folder)
    };
    let mut groups: Option<Vec<(LayerId, Grouping)>> = None;
    let mut found = PartLayers::new();
    for folder in parts {
        let part = PartReport::read(folder)?;
        part.check(run).in_file(folder)?;
        if groups.as_ref().is_some_and(|groups| *groups != part.groups) {
            refuse("it was decided otherwise than the parts before it".into(), folder)?;
        }
        groups = Some(part.groups);
        for (report, digest) in part.layers {
            let id = report.layer;
            let layer = PartLayer { folder: folder.clone(), report, digest };
            if found.insert(id, layer).is_some() {
                refuse(format!("{id} lies in another part too"), folder)?;
            }
        }
    }
    Ok((groups.unwrap_or_default(), found))
}

impl PartReport {
    fn check(&self, run: &Fingerprint) -> Result<()> {
        if self.run == *run {
            return Ok(());
        }
        let reason = format!("left by a run with another {}", self.run.difference(run));
        Err(ErrorKind::Target { reason }.into())
    }
}
