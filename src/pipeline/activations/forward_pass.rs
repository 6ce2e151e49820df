//! Text on its way through a model: all windows through one layer before the next is read.

use std::ops::Range;

use ndarray::Array2;

use crate::error::{Error, ErrorKind, Result};
use crate::forward::{DecoderLayer, FeedForward, Hidden, Model, Observer, SwitchBlock};
use crate::model::{LayerId, MoeLayer, Stack, TensorSource};
use crate::pipeline::activations::hidden_states::{States, batches};
use crate::pipeline::activations::tokens::{CalibrateOptions, Tokens};
use crate::stage::Context;

/// One layer in memory.
pub(crate) enum LoadedLayer {
    Causal(Box<DecoderLayer>),
    Switch(Box<SwitchBlock>),
}

impl LoadedLayer {
    pub(crate) fn id(&self) -> LayerId {
        match self {
            Self::Causal(layer) => layer.id(),
            Self::Switch(block) => block.id(),
        }
    }

    pub(crate) fn feed(&self) -> &FeedForward {
        match self {
            Self::Causal(layer) => layer.feed(),
            Self::Switch(block) => block.feed(),
        }
    }

    /// Takes the experts out of a sparse layer.
    pub(crate) fn take_experts(&mut self) -> Result<MoeLayer> {
        let id = self.id();
        let experts = match self {
            Self::Causal(layer) => layer.feed_mut().take_moe(),
            Self::Switch(block) => block.feed_mut().take_moe(),
        };
        experts.ok_or_else(|| Error::range("layer", "sparse and not merged before", id))
    }

    /// Everything before the MLP.
    pub(crate) fn attend(
        &self,
        hidden: &mut Hidden,
        encoded: Option<&Hidden>,
        cx: &Context,
    ) -> Result<()> {
        let Hidden { states, windows } = hidden;
        match self {
            Self::Causal(layer) => layer.attention_half(states, windows, cx),
            Self::Switch(block) => {
                let encoded = encoded.map(|e| (e.states.view(), &e.windows[..]));
                block.attention_half(states, windows, encoded, cx)
            }
        }
    }

    /// All of it, the experts observed by `observer`.
    pub(crate) fn forward(
        &self,
        hidden: &mut Hidden,
        encoded: Option<&Hidden>,
        observer: Option<&mut dyn Observer>,
        cx: &Context,
    ) -> Result<()> {
        self.attend(hidden, encoded, cx)?;
        self.feed().forward(&mut hidden.states, &hidden.windows, observer, cx)
    }
}

/// The hidden states of all windows between two layers, and the way to the next layer.
///
/// # Memory
/// One layer, one batch of windows in flight, and the states: `4 t d_model` bytes (in an
/// encoder-decoder model of both stacks) in memory or in a scratch file.
pub(crate) struct Pass<'a, S> {
    model: Model<&'a S>,
    tokens: &'a Tokens,
    options: &'a CalibrateOptions,
    batches: Vec<Range<usize>>,
    /// Layers that are still to come.
    steps: std::vec::IntoIter<LayerId>,
    stack: Stack,
    states: States,
    /// The encoder's output, while the decoder runs.
    encoded: Option<States>,
}

impl<'a, S: TensorSource> Pass<'a, S> {
    /// Embeds the text. The pass ends behind the last layer of `wanted`, and decoder windows are
    /// not looked at when none of its layers is wanted.
    pub(crate) fn new(
        source: &'a S,
        tokens: &'a Tokens,
        options: &'a CalibrateOptions,
        wanted: impl Fn(LayerId) -> bool,
    ) -> Result<Self> {
        let model = Model::open_on(source, options.cx.clone())?;
        let stacks: &[Stack] = match (&model, tokens) {
            (Model::Causal(_), Tokens::Windows(_)) => &[Stack::Causal],
            (Model::Switch(_), Tokens::Pairs(_)) => &[Stack::Encoder, Stack::Decoder],
            _ => return Err(misfit(tokens)),
        };
        let of_stack = |&stack: &Stack| {
            let id = move |index| LayerId { stack, index };
            (0..layers(&model, stack)).map(id)
        };
        let mut steps: Vec<LayerId> = stacks.iter().flat_map(of_stack).collect();
        steps.truncate(steps.iter().rposition(|&id| wanted(id)).map_or(0, |last| last + 1));
        if tokens.is_empty() {
            return Err(Error::range("calibration text", "at least one window", 0));
        }
        let batches = batches(&tokens.rows(), width(&model));
        let states = States::Memory(Vec::new());
        let (stack, steps) = (stacks[0], steps.into_iter());
        let mut pass =
            Self { model, tokens, options, batches, steps, stack, states, encoded: None };
        pass.states = pass.embed()?;
        Ok(pass)
    }

    /// Number of layers that are still to come.
    pub(crate) fn remaining(&self) -> usize {
        self.steps.len()
    }

    /// Bytes of the hidden states, those of the encoder's output included.
    pub(crate) fn bytes(&self) -> u64 {
        self.states.bytes() + self.encoded.as_ref().map_or(0, States::bytes)
    }

    /// Reads the next layer; `None` when there is none.
    pub(crate) fn next(&mut self) -> Result<Option<LoadedLayer>> {
        self.advance()?.map(|id| self.read(id)).transpose()
    }

    /// Goes on to the next layer, without reading it; `None` when there is none.
    pub(crate) fn advance(&mut self) -> Result<Option<LayerId>> {
        let Some(id) = self.steps.next() else { return Ok(None) };
        if id.stack != self.stack {
            self.enter(id.stack)?;
        }
        Ok(Some(id))
    }

    /// Reads a layer.
    pub(crate) fn read(&self, id: LayerId) -> Result<LoadedLayer> {
        Ok(match &self.model {
            Model::Switch(model) => LoadedLayer::Switch(Box::new(model.block(id.stack, id.index)?)),
            Model::Causal(model) => LoadedLayer::Causal(Box::new(model.layer(id.index)?)),
        })
    }

    /// Hands every batch of windows to `f`, with the encoder's output for the same windows.
    pub(crate) fn each(
        &mut self,
        mut f: impl FnMut(&mut Hidden, Option<&Hidden>) -> Result<()>,
    ) -> Result<()> {
        for i in 0..self.states.len() {
            let mut hidden = self.states.take(i)?;
            match &mut self.encoded {
                None => f(&mut hidden, None)?,
                Some(all) => {
                    let encoded = all.take(i)?;
                    f(&mut hidden, Some(&encoded))?;
                    all.put(i, encoded)?;
                }
            }
            self.states.put(i, hidden)?;
        }
        Ok(())
    }

    /// From the encoder to the decoder: norms the states and embeds the decoder's windows.
    fn enter(&mut self, stack: Stack) -> Result<()> {
        if let Model::Switch(model) = &self.model {
            let norm = model.final_norm(self.stack)?;
            self.each(|hidden, _| {
                hidden.states = norm.forward(hidden.states.view())?;
                Ok(())
            })?;
        }
        self.change(stack)
    }

    /// The states are the encoder's output from now on, and those of `stack` begin.
    fn change(&mut self, stack: Stack) -> Result<()> {
        self.stack = stack;
        let decoder = self.embed()?;
        self.encoded = Some(std::mem::replace(&mut self.states, decoder));
        Ok(())
    }

    /// Leaves out all layers up to `id`. What the states were behind it is for the caller to put
    /// into [`Pass::batches`].
    pub(crate) fn jump_behind(&mut self, id: LayerId) -> Result<()> {
        if !self.steps.any(|step| step == id) {
            return Err(Error::range("layer", "one of the model's that is still to come", id));
        }
        if id.stack == self.stack { Ok(()) } else { self.change(id.stack) }
    }

    /// Hands the states of every batch to `f`, the encoder's output first.
    pub(crate) fn batches(
        &mut self,
        f: &mut dyn FnMut(&mut Array2<f32>) -> Result<()>,
    ) -> Result<()> {
        for states in self.encoded.iter_mut().chain([&mut self.states]) {
            for i in 0..states.len() {
                let mut hidden = states.take(i)?;
                f(&mut hidden.states)?;
                states.put(i, hidden)?;
            }
        }
        Ok(())
    }

    /// The embedded windows of the current stack, batch by batch.
    fn embed(&self) -> Result<States> {
        let width = width(&self.model) as u64;
        let bytes = 4 * width * self.tokens.of(self.stack);
        let mut states = States::new(bytes, self.options.memory, &self.options.scratch)?;
        for batch in &self.batches {
            states.push(match (&self.model, self.tokens) {
                (Model::Causal(model), Tokens::Windows(all)) => model.embed(&all[batch.clone()])?,
                (Model::Switch(model), Tokens::Pairs(all)) => {
                    let windows =
                        all[batch.clone()].iter().map(|(input, targets)| match self.stack {
                            Stack::Decoder => model.spec().shifted(targets),
                            _ => input.clone(),
                        });
                    model.embed(self.stack, &windows.collect::<Vec<_>>())?
                }
                _ => return Err(misfit(self.tokens)),
            })?;
        }
        Ok(states)
    }
}

fn misfit(tokens: &Tokens) -> Error {
    let (found, supported) = match tokens {
        Tokens::Windows(_) => ("windows of text", "pairs of input and targets"),
        Tokens::Pairs(_) => ("pairs of input and targets", "windows of text"),
    };
    let what = "calibration text for this model";
    ErrorKind::Unsupported { what, found: found.into(), supported: supported.into() }.into()
}

fn layers<S: TensorSource>(model: &Model<S>, stack: Stack) -> usize {
    match (model, stack) {
        (Model::Causal(model), _) => model.spec().layers,
        (Model::Switch(model), Stack::Decoder) => model.spec().decoder_layers,
        (Model::Switch(model), _) => model.spec().encoder_layers,
    }
}

fn width<S: TensorSource>(model: &Model<S>) -> usize {
    match model {
        Model::Causal(model) => model.spec().d_model,
        Model::Switch(model) => model.spec().d_model,
    }
}
