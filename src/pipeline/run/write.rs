//! Writing while the next layer is made: whole layers, and layers group by group.

use std::sync::mpsc::SyncSender;

use crate::checkpoint::{Encoded, Encoder, Writer};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Grouping, LayerId, MergedLayer, Router};
use crate::par;
use crate::pipeline::layer::by_group::ExpertSink;
use crate::pipeline::layer::process::ProcessedLayer;
use crate::pipeline::progress::Observer;
use crate::pipeline::report::LayerReport;

/// Takes a merged layer and the report on it.
pub(crate) type TakeLayer<'a> = dyn FnMut(MergedLayer, &LayerReport) -> Result<()> + Send + 'a;
/// Is told of every layer that is on the disk, with the digest of its tensors.
pub(crate) type RecordLayer<'a> = dyn FnMut(&LayerReport, String) -> Result<()> + Send + 'a;

/// Makes layers by `produce`, which is given the position of each, and hands them to `consume` on a
/// thread of its own, in order: one layer is written while the next is made, and no other waits.
pub(crate) fn process_layers(
    ids: &[LayerId],
    observer: &dyn Observer,
    consume: &mut TakeLayer<'_>,
    produce: &mut dyn FnMut(usize) -> Result<(MergedLayer, LayerReport)>,
) -> Result<Vec<LayerReport>> {
    let mut reports = Vec::with_capacity(ids.len());
    // A rendezvous: the sender waits until the layer before has been written.
    let take = |(layer, report): (MergedLayer, LayerReport)| {
        consume(layer, &report).in_layer(report.layer)
    };
    par::producer_consumer(0, take, |send| {
        for (at, id) in ids.iter().enumerate() {
            let (layer, report) = produce(at).in_layer(*id)?;
            if send.send((layer, report.clone())).is_err() {
                // The consumer has failed, and its error is the one that is returned.
                break;
            }
            observer.layer_finished(&report);
            reports.push(report);
        }
        Ok(())
    })?;
    Ok(reports)
}

/// Writes a whole layer, makes it durable, and records it.
pub(crate) fn write_layer(
    writer: &mut Writer<'_>,
    layer: &MergedLayer,
    report: &LayerReport,
    record: &mut RecordLayer<'_>,
) -> Result<()> {
    writer.layer(layer)?;
    writer.sync()?;
    record(report, writer.digest(layer.id)?)
}

/// What goes to the thread that writes a layer group by group.
enum WriteStep {
    Begin(Box<LayerBegin>),
    Expert(Encoded),
    End(Box<LayerReport>),
}

/// What a folder holds of a layer beside its experts.
struct LayerBegin {
    id: LayerId,
    grouping: Grouping,
    router: Router,
    narrowed: Option<Router>,
}

/// Converts experts to bytes on the thread that merged them, and sends them to the writing thread.
struct GroupWriter<'a> {
    encoder: &'a Encoder,
    send: &'a SyncSender<WriteStep>,
}

impl GroupWriter<'_> {
    fn send(&self, step: WriteStep) -> Result<()> {
        let gone = |_| Error::io("write", std::io::Error::other("the writing thread has stopped"));
        self.send.send(step).map_err(gone)
    }
}

impl ExpertSink for GroupWriter<'_> {
    fn begin(
        &self,
        id: LayerId,
        grouping: &Grouping,
        router: &Router,
        narrowed: Option<&Router>,
    ) -> Result<()> {
        let (grouping, router) = (grouping.clone(), router.clone());
        let begin = LayerBegin { id, grouping, router, narrowed: narrowed.cloned() };
        self.send(WriteStep::Begin(Box::new(begin)))
    }

    fn expert(&self, id: LayerId, g: usize, expert: &Expert) -> Result<()> {
        self.send(WriteStep::Expert(self.encoder.expert(id, g, expert)?))
    }
}

/// Makes layers by `produce`, which is given the position of each and hands its experts on one by
/// one, and writes them on a thread of its own.
pub(crate) fn process_by_group(
    ids: &[LayerId],
    observer: &dyn Observer,
    writer: &mut Writer<'_>,
    record: &mut RecordLayer<'_>,
    produce: &mut dyn FnMut(usize, &dyn ExpertSink) -> Result<ProcessedLayer>,
) -> Result<Vec<LayerReport>> {
    /// Converted experts that wait for the disk.
    const WAITING: usize = 4;
    let encoder = writer.encoder();
    let mut reports = Vec::with_capacity(ids.len());
    let take = |step| match step {
        WriteStep::Begin(begin) => {
            let LayerBegin { id, grouping, router, narrowed } = *begin;
            writer.begin(id, &grouping, &router, narrowed.as_ref())
        }
        WriteStep::Expert(encoded) => writer.expert(encoded),
        WriteStep::End(report) => {
            writer.end(report.layer)?;
            writer.sync()?;
            record(&report, writer.digest(report.layer)?)
        }
    };
    par::producer_consumer(WAITING, take, |send| {
        let sink = GroupWriter { encoder: &encoder, send };
        for (at, id) in ids.iter().enumerate() {
            let made = produce(at, &sink).and_then(|made| {
                sink.send(WriteStep::End(Box::new(made.report.clone())))?;
                Ok(made.report)
            });
            let report = made.in_layer(*id)?;
            observer.layer_finished(&report);
            reports.push(report);
        }
        Ok(())
    })?;
    Ok(reports)
}
