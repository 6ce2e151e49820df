//! The second pass group by group, for plans in which no stage sees a whole layer at once.
//!
//! The members of a group are read, lined up, merged, converted and dropped on one thread; a thread
//! of its own writes what is ready. What is in memory is a group per thread, and every thread has
//! something to do even when the model has one layer only.

use std::sync::mpsc::SyncSender;

use crate::align;
use crate::checkpoint::{Encoded, Encoder, Writer};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, ExpertView, Grouping, LayerId, Permutation, Router};
use crate::par;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::process::{self, Before, Measured, Source};
use crate::pipeline::options::{AlignWhen, Plan};
use crate::pipeline::progress::{Observer, Phase};
use crate::pipeline::report::{Kind, LayerReport};
use crate::pipeline::run::in_memory::Decided;
use crate::stage::{Context, LayerView, Members};

/// What goes to the writing thread.
enum Step {
    /// Layer, grouping, router, narrowed router.
    Begin(Box<(LayerId, Grouping, Router, Option<Router>)>),
    Expert(Encoded),
    End(Box<LayerReport>),
}

impl Pipeline {
    /// Merges the decided layers and writes them; `line` is told of each that is on the disk, with
    /// its digest.
    pub(crate) fn stream(
        &self,
        source: &(dyn Source + Sync),
        decided: &Decided,
        writer: &mut Writer<'_>,
        observer: &dyn Observer,
        line: &mut (dyn FnMut(&LayerReport, String) -> Result<()> + Send),
    ) -> Result<Vec<LayerReport>> {
        /// Converted experts that wait for the disk.
        const WAITING: usize = 4;
        let encoder = writer.encoder();
        let layers = decided.measured.iter().zip(&decided.groupings).enumerate();
        let mut reports = Vec::with_capacity(decided.ids.len());
        let take = |step| match step {
            Step::Begin(begin) => {
                let (id, grouping, router, narrowed) = *begin;
                writer.begin(id, &grouping, &router, narrowed.as_ref())
            }
            Step::Expert(encoded) => writer.expert(encoded),
            Step::End(report) => {
                writer.end(report.layer)?;
                writer.sync()?;
                line(&report, writer.digest(report.layer)?)
            }
        };
        par::producer_consumer(WAITING, take, |send| {
            for (at, (measured, grouping)) in layers {
                let id = process::announce(observer, &decided.ids, at, Phase::Merge);
                let layer = Layer {
                    source,
                    measured,
                    grouping,
                    plan: &self.plan(false),
                    encoder: &encoder,
                    send,
                    cx: &self.cx,
                };
                let report = layer.run().in_layer(id)?;
                observer.layer_finished(&report);
                reports.push(report);
            }
            Ok(())
        })?;
        Ok(reports)
    }
}

/// One layer on its way.
struct Layer<'a> {
    source: &'a (dyn Source + Sync),
    measured: &'a Measured,
    grouping: &'a Grouping,
    plan: &'a Plan<'a>,
    encoder: &'a Encoder,
    send: &'a SyncSender<Step>,
    cx: &'a Context,
}

impl Layer<'_> {
    fn run(&self) -> Result<LayerReport> {
        let id = self.measured.summary.id;
        let router = self.source.router(id)?;
        let stats = self.source.stats(id, self.plan.merge_needs())?;
        stats.validate(router.experts(), router.weight().ncols())?;
        let view = LayerView::new(id, &router, &stats);
        let narrowed = match self.plan.router {
            None => None,
            Some(merger) => {
                Some(process::narrow(merger, &view, self.grouping, self.plan, self.cx)?)
            }
        };
        let chooses = narrowed.clone().unwrap_or_else(|| router.clone());
        let (grouping, rows) = (self.grouping.clone(), router.clone());
        self.tell(Step::Begin(Box::new((id, grouping, rows, narrowed))))?;
        let task = self.cx.per_task();
        let kinds = par::in_turn(self.grouping.groups(), |g| {
            let merged = self.group(&view, g, &task)?;
            self.tell(Step::Expert(self.encoder.expert(id, g, &merged)?))?;
            Ok(Kind::of(&merged))
        })?;
        self.source.release(id);
        let Some(&kind) = kinds.first() else {
            return Err(Error::range("groups", "at least one", 0));
        };
        if let Some(other) = kinds.iter().find(|other| **other != kind) {
            return Err(Error::shape("experts of one kind", kind.parameters, other.parameters));
        }
        let (experts, rule) = (router.experts(), *router.rule());
        let before = Before { experts, kind, rule, outputs: None };
        let summary = &self.measured.summary;
        let report = process::describe(&before, self.grouping, &chooses, summary, None);
        self.tell(Step::End(Box::new(report.clone())))?;
        Ok(report)
    }

    fn tell(&self, step: Step) -> Result<()> {
        let gone = |_| Error::io("write", std::io::Error::other("the writing thread has stopped"));
        self.send.send(step).map_err(gone)
    }

    /// The merged expert of group `g`; an expert that is alone stays as it is, bit for bit.
    fn group(&self, view: &LayerView<'_>, g: usize, cx: &Context) -> Result<Expert> {
        let indices = self.grouping.members(g);
        let dominant = self.grouping.dominants()[g];
        let read = |i: usize| self.source.expert(view.id, i);
        if let &[alone] = &indices[..] {
            return read(alone);
        }
        let experts = indices.iter().map(|&i| read(i)).collect::<Result<Vec<_>>>()?;
        let views: Vec<ExpertView<'_>> = experts.iter().map(Expert::view).collect();
        let permutations = self.line_up(view, g, &indices, &views, cx).in_expert(dominant)?;
        let members = Members {
            layer: *view,
            indices: &indices,
            dominant: indices.iter().position(|&i| i == dominant).unwrap_or(0),
            experts: &views,
            permutations: &permutations,
        };
        process::merge_one(self.plan.merger, &members, cx).in_expert(dominant)
    }

    fn line_up(
        &self,
        view: &LayerView<'_>,
        g: usize,
        indices: &[usize],
        experts: &[ExpertView<'_>],
        cx: &Context,
    ) -> Result<Vec<Permutation>> {
        if let Some(all) = &self.measured.permutations {
            return Ok(indices.iter().map(|&i| all[i].clone()).collect());
        }
        let Some(a) = self.plan.alignment.filter(|a| a.when == AlignWhen::InGroups) else {
            return Ok(experts.iter().map(|e| Permutation::identity(e.d_ff())).collect());
        };
        let table = Some(&self.measured.summary.similarity);
        let frame = align::reference_of(a.reference, self.grouping, g, table)?;
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
