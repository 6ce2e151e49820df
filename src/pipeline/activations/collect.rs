//! From text to statistics, one layer in memory at a time.

use std::collections::BTreeMap;
use std::path::Path;

use crate::calibrate::{Batch, Collector, StatsWriter};
use crate::error::{Locate, Result};
use crate::forward::{self, Observation};
use crate::model::{LayerId, RoutingStats, TensorSource};
use crate::pipeline::activations::forward_pass::Pass;
use crate::pipeline::activations::streams::SampleCapture;
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::progress::{Observer, Phase, Silent};
use crate::stage::{Context, Needs};

/// Runs text through a model and collects what its routers and experts did.
///
/// All windows go through layer `l` before layer `l + 1` is read. [`Needs::OBSERVABLE`] asks for
/// everything that can be seen.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a family without a native forward
/// pass, or windows where the family needs pairs;
/// [`ErrorKind::Missing`](crate::ErrorKind::Missing) for needs that no forward pass serves;
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a token outside the vocabulary, an
/// empty window or one longer than the model's context;
/// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for weights and hidden states, with layer
/// and tensor; those of reading.
///
/// # Memory
/// One layer in `f32`; the hidden states of all tokens, `4 t d_model` bytes, up to
/// [`CalibrateOptions::memory`], else one batch of 32 MiB; the statistics of all layers, most of
/// which are samples: [`calibrate_to_file`] holds those of one layer only.
///
/// # Example
/// ```no_run
/// use mcsmoe::checkpoint::Checkpoint;
/// use mcsmoe::pipeline::{CalibrateOptions, Tokens, calibrate};
/// use mcsmoe::stage::Needs;
///
/// let model = Checkpoint::open("mixtral")?;
/// let windows = Tokens::from(vec![vec![1, 415, 2936], vec![1, 9060, 285]]);
/// let stats = calibrate(&model, &windows, Needs::REAP, &CalibrateOptions::default())?;
/// for (layer, stats) in &stats {
///     println!("{layer}: {:?}", stats.usage());
/// }
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn calibrate<S: TensorSource>(
    source: &S,
    tokens: &Tokens,
    needs: Needs,
    options: &CalibrateOptions,
) -> Result<BTreeMap<LayerId, RoutingStats>> {
    let mut all = BTreeMap::new();
    each_layer(source, tokens, needs, options, &Silent, &mut |id, stats| {
        all.insert(id, stats);
        Ok(())
    })?;
    Ok(all)
}

/// [`calibrate`] into a file in the interchange format, which appears whole or not at all. Layers
/// are written as they are finished.
///
/// # Errors
/// As [`calibrate`]; [`ErrorKind::Io`](crate::ErrorKind::Io) with the file.
pub fn calibrate_to_file<S: TensorSource>(
    source: &S,
    tokens: &Tokens,
    needs: Needs,
    options: &CalibrateOptions,
    path: &Path,
) -> Result<()> {
    calibrate_to_file_observed(source, tokens, needs, options, path, &Silent)
}

/// [`calibrate_to_file`] with an observer.
///
/// # Errors
/// As [`calibrate_to_file`].
pub fn calibrate_to_file_observed<S: TensorSource>(
    source: &S,
    tokens: &Tokens,
    needs: Needs,
    options: &CalibrateOptions,
    path: &Path,
    observer: &dyn Observer,
) -> Result<()> {
    let family = source.config().get("model_type").and_then(|v| v.as_str());
    let metadata = family.map(|family| ("model_type".to_owned(), family.to_owned()));
    let mut writer = StatsWriter::create(path, &metadata.into_iter().collect())?;
    let sink = &mut |id, stats| writer.layer(id, &stats);
    each_layer(source, tokens, needs, options, observer, sink)?;
    writer.finish()
}

/// Hands the statistics of every MoE layer to `sink`, in order.
pub(crate) fn each_layer<S: TensorSource>(
    source: &S,
    tokens: &Tokens,
    needs: Needs,
    options: &CalibrateOptions,
    observer: &dyn Observer,
    sink: &mut dyn FnMut(LayerId, RoutingStats) -> Result<()>,
) -> Result<()> {
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
            sink(id, stats)?;
        }
    }
    Ok(())
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
