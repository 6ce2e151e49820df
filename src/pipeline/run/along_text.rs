//! Recovery on text: a layer is fitted to what it is seen to get and give on the way of the text
//! through the original model, through the layers merged so far, or both; see [`RecoverOn`].
//!
//! [`RecoverOn`]: crate::pipeline::options::RecoverOn

use ndarray::s;

use crate::checkpoint::{Checkpoint, Factoring};
use crate::error::{Error, Locate, Result};
use crate::forward::Choice;
use crate::model::{Grouping, LayerId, MergedLayer, MoeLayer, RoutingStats};
use crate::pipeline::activations::forward_pass::{Block, Pass};
use crate::pipeline::activations::samples::Seen;
use crate::pipeline::activations::streams::Streams;
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::builder::Pipeline;
use crate::pipeline::compress;
use crate::pipeline::layer::process::{self, Measured};
use crate::pipeline::layer::spectra;
use crate::pipeline::options::Plan;
use crate::pipeline::progress::Phase;
use crate::pipeline::report::{LayerReport, OutputError};
use crate::pipeline::run::in_memory::Decided;
use crate::pipeline::run::resume::hidden_states::Bookmarks;
use crate::pipeline::run::two_pass::Job;
use crate::pipeline::size::Ranks;
use crate::stage::{Compression, Recovery};

impl Pipeline {
    /// Second pass along the text: merges, recovers and hands on layer by layer, from the layer
    /// behind the bookmark `from` on. Bookmarks are set in the folder of `options`.
    ///
    /// # Memory
    /// The layer, its merged experts and what the recoverer holds; the hidden states; and of the
    /// layer at hand inputs and targets of all tokens, `16 t d_model` bytes.
    pub(crate) fn follow(
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
            process::announce(job.observer, &decided.ids, at, Phase::Merge);
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
    pub(crate) fn recovered(
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
        let mut spectra = spectra::original(layer.experts(), self.measure_spectra, &self.cx)?;
        let plan = self.along_text();
        let merged = process::merge_layer(layer, stats, measured, grouping, &plan, &self.cx)?;
        let (mut merged, mut report) = merged;
        let narrowed = self.router.is_some();
        {
            let (inputs, targets, held_out) = seen.split()?;
            let (inputs, targets) = (inputs.view(), targets.view());
            let task = Recovery { inputs, targets, narrowed, held_out };
            if let Some(recoverer) = &self.recoverer {
                merged = recoverer.recover(&task, merged, &self.cx)?;
            }
            spectra::merged(&mut spectra, &merged.experts, &self.cx)?;
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
                spectra::compressed(&mut spectra, &merged.experts, &self.cx)?;
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
    pub(crate) fn along_text(&self) -> Plan<'_> {
        let plan = self.plan(false);
        Plan { recoverer: None, compressor: None, measure_spectra: Some(false), ..plan }
    }
}

/// A layer, and what is known of it before it is merged.
pub(crate) struct Observed<'a> {
    pub(crate) layer: MoeLayer,
    pub(crate) seen: Seen,
    pub(crate) stats: &'a RoutingStats,
    pub(crate) measured: &'a Measured,
    pub(crate) grouping: &'a Grouping,
}

/// The experts of a layer that is to be merged.
pub(crate) fn take_moe(block: &mut Block) -> Result<MoeLayer> {
    let id = block.id();
    let missing = || Error::range("layer to recover", "sparse and not merged before", id);
    block.take_moe().ok_or_else(missing).in_layer(id)
}
