//! Recovery on text: a layer is fitted to what it is seen to get and give on the way of the text
//! through the original model, through the layers merged so far, or both; see [`RecoverOn`].
//!
//! [`RecoverOn`]: super::policy::RecoverOn

use ndarray::s;

use super::bookmark::Bookmarks;
use super::builder::Pipeline;
use super::compress;
use super::engine::{self, Measured};
use super::job::Job;
use super::observe::Phase;
use super::pass::{Block, Pass};
use super::passes::Decided;
use super::policy::Plan;
use super::report::{LayerReport, OutputError};
use super::seen::Seen;
use super::singular;
use super::size::Ranks;
use super::streams::Streams;
use super::tokens::{CalibrateOptions, Tokens};
use crate::checkpoint::{Checkpoint, Factoring};
use crate::error::{Error, Locate, Result};
use crate::forward::Choice;
use crate::model::{Grouping, LayerId, MergedLayer, MoeLayer, RoutingStats};
use crate::stage::{Compression, Recovery};

impl Pipeline {
    /// Second pass along the text: merges, recovers and hands on layer by layer, from the layer
    /// behind the bookmark `from` on. Bookmarks are set in the folder of `options`.
    ///
    /// # Memory
    /// The layer, its merged experts and what the recoverer holds; the hidden states; and of the
    /// layer at hand inputs and targets of all tokens, `16 t d_model` bytes.
    pub(super) fn follow(
        &self,
        job: &Job<'_>,
        (tokens, from): (&Tokens, Option<LayerId>),
        options: &CalibrateOptions,
        decided: &Decided,
        sink: &mut (dyn FnMut(MergedLayer, &LayerReport) -> Result<()> + Send),
    ) -> Result<Vec<LayerReport>> {
        if decided.ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut streams =
            Streams::to_recover(job.source, self.recover_on, tokens, &decided.ids, options)?;
        let mut bookmarks = Bookmarks::new(&options.scratch);
        if let Some(id) = from {
            bookmarks.open(&mut streams, id)?;
        }
        self.hand_on(&decided.ids, job.observer, sink, &mut |at| {
            engine::announce(job.observer, &decided.ids, at, Phase::Merge);
            let made = self.reach(&mut streams, decided.at(at)?, decided.ranks.as_ref(), job)?;
            bookmarks.set(&mut streams, decided.ids[at])?;
            Ok(made)
        })
    }

    /// Runs up to the layer of `measured`, merges and recovers it, and runs through the result.
    fn reach(
        &self,
        streams: &mut Streams<'_>,
        (measured, grouping): (&Measured, &Grouping),
        kept: Option<&Ranks>,
        job: &Job<'_>,
    ) -> Result<(MergedLayer, LayerReport)> {
        let wanted = measured.summary.id;
        let lost = || Error::range("layer", "one of the model's, in order", wanted);
        while let Some(id) = streams.advance()? {
            let mut block = streams.read(id)?;
            if id != wanted {
                streams.forward(&block, &self.cx)?;
                continue;
            }
            let tapped = streams.tap(&block, &self.cx)?;
            let seen = streams.look(&block, tapped, &self.cx)?.ok_or_else(lost)?;
            let layer = take_moe(&mut block)?;
            let stats = job.stats.layer(&id, self.along_text().merge_needs())?;
            let layer = Observed { layer, seen, stats: &stats, measured, grouping };
            return self.recovered(streams.merged.as_mut(), &block, layer, kept);
        }
        Err(lost())
    }

    /// Merges, recovers and compresses a layer, and runs the stream of merged layers, if there is
    /// one, through what became of it.
    pub(super) fn recovered(
        &self,
        pass: Option<&mut Pass<'_, Checkpoint>>,
        block: &Block,
        observed: Observed<'_>,
        kept: Option<&Ranks>,
    ) -> Result<(MergedLayer, LayerReport)> {
        let Observed { layer, seen, stats, measured, grouping } = observed;
        let compressor = self.compressor.as_deref();
        let ranks = compressor.map(|_| compress::original_ranks(&layer, grouping, &self.cx));
        let ranks = ranks.transpose()?;
        let mut spectra = singular::original(layer.experts(), self.measure_spectra, &self.cx)?;
        let plan = self.along_text();
        let merged = engine::merge_layer(layer, stats, measured, grouping, &plan, &self.cx)?;
        let (mut merged, mut report) = merged;
        let narrowed = self.router.is_some();
        {
            let (inputs, targets, held_out) = seen.split()?;
            let (inputs, targets) = (inputs.view(), targets.view());
            let task = Recovery { inputs, targets, narrowed, held_out };
            if let Some(recoverer) = &self.recoverer {
                merged = recoverer.recover(&task, merged, &self.cx)?;
            }
            singular::merged(&mut spectra, &merged.experts, &self.cx)?;
            if let (Some(compressor), Some(ranks)) = (compressor, ranks) {
                let seen = Some(inputs.slice(s![..task.fitted(), ..]));
                let allocated = kept.and_then(|kept| kept.get(&merged.id));
                let task = Compression {
                    inputs: seen,
                    narrowed,
                    usage: &measured.usage(grouping),
                    gradients: None,
                    allocated: allocated.map(Factoring::experts),
                };
                let done = compress::compress(compressor, merged, &ranks, &task, &self.cx)?;
                (merged, report.compression) = (done.0, Some(done.1));
                singular::compressed(&mut spectra, &merged.experts, &self.cx)?;
            }
            report.spectra = spectra;
            let error = task.error(&merged, &self.cx)?;
            report.output_error = Some(match narrowed {
                true => OutputError {
                    mapped: Recovery { narrowed: false, ..task }.error(&merged, &self.cx)?,
                    narrowed: Some(error),
                },
                false => OutputError { mapped: error, narrowed: None },
            });
        }
        let Some(pass) = pass else { return Ok((merged, report)) };
        let choice = if narrowed { Choice::Narrowed } else { Choice::Mapped };
        let mut inputs = seen.inputs.into_iter();
        pass.each(|hidden, _| {
            let Some(x) = inputs.next() else { return Ok(()) };
            let (states, windows) = (&mut hidden.states, &hidden.windows);
            let substitute = Some((&merged, choice));
            block.feed().add_to(states, x.view(), windows, substitute, None, &self.cx)
        })?;
        Ok((merged, report))
    }

    /// The merge alone: recovery and compression follow the text themselves, and the spectra them.
    pub(super) fn along_text(&self) -> Plan<'_> {
        let plan = self.plan(false);
        Plan { recoverer: None, compressor: None, measure_spectra: Some(false), ..plan }
    }
}

/// A layer, and what is known of it before it is merged.
pub(super) struct Observed<'a> {
    pub(super) layer: MoeLayer,
    pub(super) seen: Seen,
    pub(super) stats: &'a RoutingStats,
    pub(super) measured: &'a Measured,
    pub(super) grouping: &'a Grouping,
}

/// The experts of a layer that is to be merged.
pub(super) fn take_moe(block: &mut Block) -> Result<MoeLayer> {
    let id = block.id();
    let missing = || Error::range("layer to recover", "sparse and not merged before", id);
    block.take_moe().ok_or_else(missing).in_layer(id)
}
