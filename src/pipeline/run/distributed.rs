//! A run in pieces, for several machines: once statistics exist, layers are independent.
//!
//! Every process decides for all layers, which is deterministic, then merges and writes its own
//! into a folder of safetensors files with a partial manifest. [`Pipeline::assemble`] joins the
//! folders; the target has the bytes that one process would have written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::calibrate::StatsFile;
use crate::checkpoint::{Checkpoint, MANIFEST, Part, Partial, Writer, read_json};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Grouping, LayerId};
use crate::pipeline::activations::calibration::Given;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::options::LayerShape;
use crate::pipeline::progress::Observer;
use crate::pipeline::report::{LayerReport, Report};
use crate::pipeline::run::Output;
use crate::pipeline::run::in_memory::Decided;
use crate::pipeline::run::resume::fingerprint::Fingerprint;
use crate::pipeline::run::resume::journal::{Journal, Line};
use crate::pipeline::run::two_pass::{Folder, Job};
use crate::stage::Needs;

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

impl Pipeline {
    /// Merges the layers `layers`, positions in [`Checkpoint::layers`], and writes them into
    /// `folder`, which appears whole or not at all.
    ///
    /// With [`Output::resume`] what an interrupted process left is written over, and a folder that
    /// is there already is taken if it belongs to this run: a job queued again does no harm.
    /// Layers that are protected are in no part; they are copied when the parts are joined.
    ///
    /// # Errors
    /// As [`Pipeline::run_checkpoint`]; [`ErrorKind::OutOfRange`] for positions beyond the last.
    ///
    /// # Cost
    /// The first pass over all layers (similarity, alignment before grouping) in every process, the
    /// second over its own.
    pub fn run_part(
        &self,
        source: &Checkpoint,
        stats: &StatsFile,
        layers: Range<usize>,
        folder: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<PartReport> {
        let given = Given::Statistics(stats);
        let (shapes, ids) = self.check_part(source, given, output)?;
        if layers.is_empty() || layers.end > shapes.len() {
            let found = format!("{}..{}", layers.start, layers.end);
            return Err(Error::range("layers", format!("within 0..{}", shapes.len()), found));
        }
        let own: Vec<LayerId> = shapes[layers].iter().map(|shape| shape.id).collect();
        if !own.iter().any(|id| ids.contains(id)) {
            return Err(Error::range("layers", "at least one that is merged", "protected ones"));
        }
        let run = Fingerprint::of(self, source, given, output)?;
        if output.resume && folder.join(MANIFEST).exists() {
            return self.found(folder, &run, &own);
        }
        let begin = if output.resume { Partial::resume } else { Partial::create };
        let partial = begin(source.dir(), folder)?;
        clear(partial.path())?;
        let job = Job { source, stats, tokens: None, shapes: &shapes, ids: &ids, output, observer };
        let decided = self.decide(&Folder { source, stats }, &shapes, observer)?;
        let all: Vec<_> = decided.ids.iter().copied().zip(decided.groupings.clone()).collect();
        let mut plan = self.write_plan(source, output, all.iter().cloned().collect())?;
        plan.only = Some(own.iter().copied().filter(|id| ids.contains(id)).collect());
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut written = Vec::new();
        let line = &mut |report: &LayerReport, digest| {
            written.push((report.clone(), digest));
            Ok(())
        };
        let samples = ids.iter().all(|id| stats.available(id).contains(Needs::SAMPLES));
        let decided = decided.only(&own);
        self.write_layers(&job, None, (&decided, samples), &mut writer, line)?;
        let report = PartReport { run, groups: all, layers: written };
        writer.finish(&serde_json::to_value(&report).unwrap_or_default())?;
        Ok(report)
    }

    /// [`Pipeline::check_run`], and that layers do not depend on each other.
    fn check_part(
        &self,
        source: &Checkpoint,
        given: Given<'_>,
        output: &Output,
    ) -> Result<(Vec<LayerShape>, Vec<LayerId>)> {
        if self.size_budget().is_some() {
            let reason = "a size budget is spent over all layers at once: run it in one process";
            return Err(ErrorKind::Recipe { reason: reason.into() }.into());
        }
        self.check_run(source, given, output)
    }

    /// A part that is there already.
    fn found(&self, folder: &Path, run: &Fingerprint, own: &[LayerId]) -> Result<PartReport> {
        let found = PartReport::read(folder)?;
        found.check(run).in_file(folder)?;
        let other = found.layers().find(|layer| !own.contains(&layer.layer));
        match other {
            None => Ok(found),
            Some(layer) => {
                let reason = format!("it holds {}, which is not asked for", layer.layer);
                Err(ErrorKind::Target { reason }.into()).in_file(folder)
            }
        }
    }

    /// Joins the folders that [`Pipeline::run_part`] has written into `target`, which has the bytes
    /// of a run in one process. Everything else is copied from the source.
    ///
    /// # Errors
    /// As [`Pipeline::run_checkpoint`]; [`ErrorKind::Target`] when a part belongs to another run or
    /// a layer lies in none or in two; [`ErrorKind::Format`] when a part is not what its manifest
    /// says.
    ///
    /// # Cost
    /// Reads and writes every byte once; nothing is computed but hashes.
    pub fn assemble(
        &self,
        source: &Checkpoint,
        stats: &StatsFile,
        parts: &[PathBuf],
        target: &Path,
        output: &Output,
        observer: &dyn Observer,
    ) -> Result<Report> {
        let given = Given::Statistics(stats);
        let (_, ids) = self.check_part(source, given, output)?;
        let run = Fingerprint::of(self, source, given, output)?;
        let (groups, mut found) = gather(parts, &run)?;
        let missing: Vec<String> =
            ids.iter().filter(|id| !found.contains_key(id)).map(LayerId::to_string).collect();
        if !missing.is_empty() {
            let reason = format!("no part holds {}", missing.join(", "));
            return Err(ErrorKind::Target { reason }.into()).in_file(target);
        }
        let begin = if output.resume { Partial::resume } else { Partial::create };
        let partial = begin(source.dir(), target)?;
        let mut journal = Journal::open(partial.path(), &run)?;
        journal.write(&Line::Groups(groups.clone()))?;
        let plan = self.write_plan(source, output, groups.into_iter().collect())?;
        let mut writer = Writer::within(source, partial, &plan)?;
        let mut reports = BTreeMap::new();
        for id in ids.iter().copied() {
            let Some((part, report, digest)) = found.remove(&id) else { continue };
            writer.take(id, &Part::open(&part)?, &digest)?;
            journal.write(&Line::Layer(Box::new(report.clone()), digest))?;
            observer.layer_finished(&report);
            reports.insert(id, report);
        }
        let shown = (stats.tokens(), observer);
        self.conclude(source, &plan, reports, (writer, journal), shown, target)
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

/// A layer in a part: the folder, the report, the digest.
type Found = BTreeMap<LayerId, (PathBuf, LayerReport, String)>;

/// What the parts hold, each layer once.
fn gather(parts: &[PathBuf], run: &Fingerprint) -> Result<(Vec<(LayerId, Grouping)>, Found)> {
    let refuse = |reason: String, folder: &Path| -> Result<()> {
        Err(ErrorKind::Target { reason }.into()).in_file(folder)
    };
    let mut groups: Option<Vec<(LayerId, Grouping)>> = None;
    let mut found = Found::new();
    for folder in parts {
        let part = PartReport::read(folder)?;
        part.check(run).in_file(folder)?;
        if groups.as_ref().is_some_and(|groups| *groups != part.groups) {
            refuse("it was decided otherwise than the parts before it".into(), folder)?;
        }
        groups = Some(part.groups);
        for (report, digest) in part.layers {
            let id = report.layer;
            if found.insert(id, (folder.clone(), report, digest)).is_some() {
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

impl Decided {
    /// The layers `own` of it.
    fn only(self, own: &[LayerId]) -> Self {
        let all = self.ids.into_iter().zip(self.measured).zip(self.groupings);
        let (ids, measured, groupings) = (Vec::new(), Vec::new(), Vec::new());
        let mut kept = Self { ids, measured, groupings, ranks: self.ranks };
        for ((id, measured), grouping) in all.filter(|((id, _), _)| own.contains(id)) {
            kept.ids.push(id);
            kept.measured.push(measured);
            kept.groupings.push(grouping);
        }
        kept
    }
}
