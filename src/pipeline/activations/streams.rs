//! Text on its way through the original model and through the layers merged so far, side by side,
//! and what a layer is seen to get and give in them.

use ndarray::{Array2, s};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::forward::{Choice, Observation, Observer};
use crate::model::{LayerId, MergedLayer};
use crate::pipeline::activations::forward_pass::{LoadedLayer, Pass};
use crate::pipeline::activations::samples::{LayerSamples, joined};
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::pipeline::options::RecoverOn;
use crate::stage::Context;

/// One stream or two. Where both run, they are at the same layer.
pub(crate) struct Streams<'a> {
    /// Through the original model.
    pub(crate) original: Option<Pass<'a, Checkpoint>>,
    /// Through the layers merged so far.
    pub(crate) merged: Option<Pass<'a, Checkpoint>>,
}

impl<'a> Streams<'a> {
    /// Embeds the text of each stream; both end behind the last of `ids`.
    pub(crate) fn open(
        source: &'a Checkpoint,
        (original, merged): (Option<&'a Tokens>, Option<&'a Tokens>),
        ids: &[LayerId],
        options: &'a CalibrateOptions,
    ) -> Result<Self> {
        let open = |tokens| Pass::new(source, tokens, options, |id| ids.contains(&id));
        Ok(Self {
            original: original.map(open).transpose()?,
            merged: merged.map(open).transpose()?,
        })
    }

    /// The streams that a recoverer learns from, on `tokens`.
    pub(crate) fn to_recover(
        source: &'a Checkpoint,
        on: RecoverOn,
        tokens: &'a Tokens,
        ids: &[LayerId],
        options: &'a CalibrateOptions,
    ) -> Result<Self> {
        let streams = (on.captures_original().then_some(tokens), on.follows().then_some(tokens));
        Self::open(source, streams, ids, options)
    }

    /// Runs all text up to layer `id` and reads that layer. `reached` is told of every layer on the
    /// way, and of `id`.
    pub(crate) fn advance_to(
        &mut self,
        id: LayerId,
        cx: &Context,
        reached: &mut dyn FnMut(LayerId),
    ) -> Result<LoadedLayer> {
        while let Some(next) = self.advance()? {
            reached(next);
            let layer = self.read(next)?;
            if next == id {
                return Ok(layer);
            }
            self.forward(&layer, cx)?;
        }
        Err(Error::range("layer", "one of the model's, in order", id))
    }

    /// Runs the merged stream, if there is one, through what became of a layer, from the inputs
    /// that [`capture_merged`](Self::capture_merged) has left in `samples`.
    pub(crate) fn leave(
        &mut self,
        layer: &LoadedLayer,
        samples: LayerSamples,
        (merged, narrowed): (&MergedLayer, bool),
        cx: &Context,
    ) -> Result<()> {
        let Some(pass) = &mut self.merged else { return Ok(()) };
        let choice = if narrowed { Choice::Narrowed } else { Choice::Mapped };
        let (mut inputs, expected) = (samples.inputs.into_iter(), samples.windows.len());
        let lost = || Error::shape("batches of a layer's inputs", expected, "fewer");
        pass.each(|hidden, _| {
            let x = inputs.next().ok_or_else(lost)?;
            let (states, windows) = (&mut hidden.states, &hidden.windows);
            let substitute = Some((merged, choice));
            layer.feed().add_to(states, x.view(), windows, substitute, None, cx)
        })
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Pass<'a, Checkpoint>> {
        self.original.iter_mut().chain(&mut self.merged)
    }

    /// Goes on to the next layer, without reading it; `None` when there is none.
    fn advance(&mut self) -> Result<Option<LayerId>> {
        let mut next = None;
        for pass in self.all() {
            next = pass.advance()?;
        }
        Ok(next)
    }

    /// Reads a layer, for both streams.
    fn read(&self, id: LayerId) -> Result<LoadedLayer> {
        let pass = self.original.as_ref().or(self.merged.as_ref());
        pass.ok_or_else(|| Error::range("streams of text", "at least one", 0))?.read(id)
    }

    /// Runs all through a layer that stays as it is.
    fn forward(&mut self, block: &LoadedLayer, cx: &Context) -> Result<()> {
        let mut all = self.all();
        all.try_for_each(|pass| {
            pass.each(|hidden, encoded| block.forward(hidden, encoded, None, cx))
        })
    }

    /// Runs the original's stream, if there is one, through a layer that `observer` watches.
    pub(crate) fn observe_original(
        &mut self,
        block: &LoadedLayer,
        observer: &mut dyn Observer,
        cx: &Context,
    ) -> Result<()> {
        let Some(pass) = &mut self.original else { return Ok(()) };
        pass.each(|hidden, encoded| block.forward(hidden, encoded, Some(&mut *observer), cx))
    }

    /// Runs the original's stream through a layer and captures the layer's inputs and outputs.
    pub(crate) fn capture_original(
        &mut self,
        block: &LoadedLayer,
        cx: &Context,
    ) -> Result<Option<LayerSamples>> {
        let mut capture = SampleCapture::new(None);
        self.observe_original(block, &mut capture, cx)?;
        Ok(self.original.as_ref().map(|_| capture.samples))
    }

    /// Runs the merged stream up to the experts of a layer and captures their inputs. Their outputs
    /// were `captured` from the original's stream, or are computed. Without a merged stream,
    /// `captured` as it is.
    pub(crate) fn capture_merged(
        &mut self,
        block: &LoadedLayer,
        captured: Option<LayerSamples>,
        cx: &Context,
    ) -> Result<Option<LayerSamples>> {
        let Some(pass) = &mut self.merged else { return Ok(captured) };
        let mut samples = LayerSamples::default();
        pass.each(|hidden, encoded| {
            block.attend(hidden, encoded, cx)?;
            let x = block.feed().input(hidden.states.view())?;
            if captured.is_none() {
                samples.targets.extend(block.feed().routed(x.view(), &hidden.windows, cx)?);
            }
            samples.inputs.push(x);
            samples.windows.push(hidden.windows.clone());
            Ok(())
        })?;
        if let Some(captured) = captured {
            samples.targets = rebatched(&captured.targets, &samples.inputs)?;
        }
        Ok(Some(samples))
    }
}

/// Hidden states of a text between two layers, which can be saved and restored.
pub(crate) trait ResumableStates {
    /// Number of layers that are still to come.
    fn remaining(&self) -> usize;
    /// Bytes of the hidden states.
    fn bytes(&self) -> u64;
    /// Leaves out all layers up to `id`.
    fn jump_behind(&mut self, id: LayerId) -> Result<()>;
    /// Hands all hidden states to `f`, in the same order every time.
    fn batches(&mut self, f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>) -> Result<()>;
}

impl ResumableStates for Streams<'_> {
    fn remaining(&self) -> usize {
        self.original.as_ref().or(self.merged.as_ref()).map_or(0, Pass::remaining)
    }

    fn bytes(&self) -> u64 {
        self.original.iter().chain(&self.merged).map(Pass::bytes).sum()
    }

    fn jump_behind(&mut self, id: LayerId) -> Result<()> {
        self.all().try_for_each(|pass| pass.jump_behind(id))
    }

    fn batches(&mut self, f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>) -> Result<()> {
        self.all().try_for_each(|pass| pass.batches(f))
    }
}

/// `rows` in batches of the same sizes as `like`.
fn rebatched(rows: &[Array2<f32>], like: &[Array2<f32>]) -> Result<Vec<Array2<f32>>> {
    let all = joined(&rows.iter().map(|rows| rows.view()).collect::<Vec<_>>())?;
    let total = like.iter().map(Array2::nrows).sum::<usize>();
    if all.nrows() != total {
        return Err(Error::shape("tokens of both streams", total, all.nrows()));
    }
    let mut first = 0;
    let batch = |like: &Array2<f32>| {
        first += like.nrows();
        all.slice(s![first - like.nrows()..first, ..]).to_owned()
    };
    Ok(like.iter().map(batch).collect())
}

/// Captures inputs and outputs of a layer while text runs through it.
pub(crate) struct SampleCapture<'a> {
    /// Ascending windows; `None` for all.
    wanted: Option<&'a [usize]>,
    passed: usize,
    samples: LayerSamples,
}

impl<'a> SampleCapture<'a> {
    pub(crate) fn new(wanted: Option<&'a [usize]>) -> Self {
        Self { wanted, passed: 0, samples: LayerSamples::default() }
    }

    pub(crate) fn into_samples(self) -> LayerSamples {
        self.samples
    }
}

impl Observer for SampleCapture<'_> {
    fn observe(&mut self, seen: &Observation<'_>) -> Result<()> {
        let first = self.passed;
        self.passed += seen.windows.len();
        let wanted = |i: usize| self.wanted.is_none_or(|all| all.binary_search(&i).is_ok());
        let windows = seen.windows.iter().enumerate().filter(|(i, _)| wanted(first + i));
        let windows: Vec<_> = windows.map(|(_, rows)| rows.clone()).collect();
        if !windows.is_empty() {
            self.samples.push(seen.inputs, seen.output, &windows)?;
        }
        Ok(())
    }
}
