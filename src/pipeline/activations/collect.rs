//! From text to statistics, one layer in memory at a time.

use std::collections::BTreeMap;
use std::path::Path;

use crate::calibrate::text::TextRecord;
use crate::calibrate::{Batch, Collector, StatsWriter};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::forward::{self, Observation};
use crate::model::{LayerId, RoutingStats, TensorSource};
use crate::pipeline::activations::forward_pass::Pass;
use crate::pipeline::activations::streams::SampleCapture;
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::progress::{Observer, Phase, Silent};
use crate::pipeline::provenance::TEXT_KEY;
use crate::stage::{Context, Needs};

/// Collects statistics: runs text through a model and records what its routers and experts did.
///
/// All windows go through layer `l` before layer `l + 1` is read. [`Needs::OBSERVABLE`] asks for
/// everything that can be observed. Ends with [`collect`](Collection::collect) or
/// [`write`](Collection::write).
///
/// # Example
/// ```no_run
/// use mcsmoe::checkpoint::Checkpoint;
/// use mcsmoe::pipeline::{Tokens, calibrate};
/// use mcsmoe::stage::Needs;
///
/// let model = Checkpoint::open("mixtral")?;
/// let windows = Tokens::from(vec![vec![1, 415, 2936], vec![1, 9060, 285]]);
/// for (layer, stats) in calibrate(&model, &windows, Needs::REAP).collect()? {
///     println!("{layer}: {:?}", stats.usage());
/// }
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn calibrate<'a, S: TensorSource>(
    source: &'a S,
    tokens: &'a Tokens,
    needs: Needs,
) -> Collection<'a, S> {
    let options = CalibrateOptions::default();
    Collection { source, tokens, needs, options, observer: &Silent, text: None }
}

/// Statistics that are to be collected; see [`calibrate`].
#[derive(Clone)]
#[must_use]
pub struct Collection<'a, S> {
    source: &'a S,
    tokens: &'a Tokens,
    needs: Needs,
    options: CalibrateOptions,
    observer: &'a dyn Observer,
    text: Option<&'a TextRecord>,
}

impl<'a, S: TensorSource> Collection<'a, S> {
    /// How text runs through the model.
    pub fn options(self, options: CalibrateOptions) -> Self {
        Self { options, ..self }
    }

    /// The record of the text that the tokens come from; a file of the statistics names it.
    pub fn text(self, record: &'a TextRecord) -> Self {
        Self { text: Some(record), ..self }
    }

    /// Who is told of the progress.
    pub fn observer(self, observer: &'a dyn Observer) -> Self {
        Self { observer, ..self }
    }

    /// The statistics of all MoE layers.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a family without a native
    /// forward pass, or windows where the family needs pairs;
    /// [`ErrorKind::Missing`](crate::ErrorKind::Missing) for needs that no forward pass serves;
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a token outside the vocabulary,
    /// an empty window or one longer than the model's context;
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for weights and hidden states, with
    /// layer and tensor; those of reading.
    ///
    /// # Memory
    /// One layer in `f32`; the hidden states of all tokens, `4 t d_model` bytes, up to
    /// [`CalibrateOptions::memory`], else one batch of 32 MiB; the statistics of all layers, most
    /// of which are samples: [`write`](Self::write) holds those of one layer only.
    pub fn collect(self) -> Result<BTreeMap<LayerId, RoutingStats>> {
        let mut all = BTreeMap::new();
        self.each_layer(&mut |id, stats| {
            all.insert(id, stats);
            Ok(())
        })?;
        Ok(all)
    }

    /// Writes the statistics to `file` in the interchange format, layer by layer. The file appears
    /// whole or not at all.
    ///
    /// # Errors
    /// As [`collect`](Self::collect); [`ErrorKind::Io`](crate::ErrorKind::Io) with the file.
    pub fn write(self, file: impl AsRef<Path>) -> Result<()> {
        let family = self.source.config().get("model_type").and_then(|v| v.as_str());
        let metadata = family.map(|family| ("model_type".to_owned(), family.to_owned()));
        let mut metadata: BTreeMap<_, _> = metadata.into_iter().collect();
        if let Some(record) = self.text {
            let json = serde_json::to_string(record).map_err(|e| {
                let reason = e.to_string();
                Error::from(ErrorKind::Format { format: "record of the text", reason })
            })?;
            metadata.insert(TEXT_KEY.to_owned(), json);
        }
        let mut writer = StatsWriter::create(file.as_ref(), &metadata)?;
        self.each_layer(&mut |id, stats| writer.layer(id, &stats))?;
        writer.finish()
    }

    /// Hands the statistics of every MoE layer to `consume`, in order.
    fn each_layer(
        &self,
        consume: &mut dyn FnMut(LayerId, RoutingStats) -> Result<()>,
    ) -> Result<()> {
        let Self { source, tokens, needs, ref options, observer, .. } = *self;
        Collector::new(needs)?; // Refuses what cannot be served before any weight is read.
        let mut pass = Pass::new(source, tokens, options, |id| source.is_moe(id))?;
        let total = pass.remaining();
        for done in 0.. {
            let Some(block) = pass.next()? else { break };
            let id = block.id();
            observer.layer_started(id, Phase::Calibrate, done, total);
            let of = tokens.of(id.stack);
            let mut collector = Collector::new(needs)?.sample(options.samples, of);
            pass.each(|hidden, encoded| {
                let mut collected =
                    CollectedLayer { collector: &mut collector, capture: None, cx: &options.cx };
                block.forward(hidden, encoded, Some(&mut collected), &options.cx).in_layer(id)
            })?;
            if block.feed().moe().is_some() {
                let stats = collector.finish().in_layer(id)?;
                drop(block);
                consume(id, stats)?;
            }
        }
        Ok(())
    }
}

/// Collects statistics of a layer while text runs through it, and inputs and outputs for recovery.
pub(crate) struct CollectedLayer<'a, 't> {
    pub(crate) collector: &'a mut Collector,
    pub(crate) capture: Option<&'a mut SampleCapture<'t>>,
    pub(crate) cx: &'a Context,
}

impl forward::Observer for CollectedLayer<'_, '_> {
    fn watches_outputs(&self) -> bool {
        self.collector.needs_outputs()
    }

    fn observe(&mut self, seen: &Observation<'_>) -> Result<()> {
        let routed = seen.routed;
        let batch = Batch {
            inputs: seen.inputs,
            logits: routed.logits.view(),
            routing: &routed.routing,
            kept: routed.kept.as_ref().map(|kept| kept.view()),
            output: Some(seen.output),
            outputs: seen.outputs,
            mask: None,
        };
        self.collector.add(seen.layer, &batch, self.cx)?;
        self.capture.as_mut().map_or(Ok(()), |capture| capture.observe(seen))
    }
}
