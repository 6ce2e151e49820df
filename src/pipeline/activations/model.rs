//! A checkpoint that text runs through, and the text as the model's kind wants it.

use ndarray::{ArrayView2, s};

use crate::calibrate::text::{Limits, SpanCorruption, Text, sentinels};
use crate::checkpoint::Checkpoint;
use crate::error::{Locate, Result};
use crate::forward::{Head, Hidden, Model, Observer};
use crate::model::TensorSource;
use crate::stage::Context;

/// An open model.
pub(crate) struct EvalModel<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) model: Model<&'a Checkpoint>,
}

/// What runs through the model, window by window.
pub(crate) enum Sequences {
    /// Tokens; all but the first are predicted.
    Causal(Vec<Vec<u32>>),
    /// Inputs and targets; all targets are predicted.
    Pairs(Vec<(Vec<u32>, Vec<u32>)>),
}

/// The end of a run: the states of every window, and what each of their rows is to predict.
pub(crate) struct ModelOutput {
    pub(crate) hidden: Hidden,
    pub(crate) head: Head,
}

impl<'a> EvalModel<'a> {
    pub(crate) fn open(checkpoint: &'a Checkpoint, cx: &Context) -> Result<Self> {
        let model = Model::open_on(checkpoint, cx.clone());
        let model = model.in_file(&checkpoint.dir().join("config.json"))?;
        Ok(Self { checkpoint, model })
    }

    /// Number of token ids, and the longest window.
    pub(crate) fn limits(&self) -> Limits {
        match &self.model {
            Model::Causal(model) => {
                let longest = model.spec().longest_window;
                Limits { vocab: model.spec().vocab, longest, usual: 512 }
            }
            // Relative positions: any length, up to what span corruption can draw.
            Model::Switch(model) => {
                Limits { vocab: model.spec().vocab, longest: 10_000, usual: 256 }
            }
        }
    }

    /// The windows as the model wants them. The seed of window `w` of source `s` is
    /// `seed + 1000 s + w`.
    pub(crate) fn items(&self, text: &Text, seed: u64) -> Result<Sequences> {
        let Model::Switch(_) = self.model else {
            return Ok(Sequences::Causal(text.windows().map(<[u32]>::to_vec).collect()));
        };
        let corruption = self.corruption()?;
        let mut pairs = Vec::new();
        for (s, source) in text.sources().iter().enumerate() {
            for (w, window) in source.windows.iter().enumerate() {
                let seed = seed.wrapping_add(1000 * s as u64 + w as u64);
                pairs.push(corruption.corrupt(window, seed)?);
            }
        }
        Ok(Sequences::Pairs(pairs))
    }

    /// The span corruption that the checkpoint's tokenizer has sentinels for.
    pub(crate) fn corruption(&self) -> Result<SpanCorruption> {
        let sentinels = sentinels(self.checkpoint.dir())?;
        let end = self.checkpoint.config().integer("eos_token_id")?.unwrap_or(1);
        Ok(SpanCorruption::new(sentinels, end as u32))
    }

    /// All windows through the model, one layer in memory at a time.
    pub(crate) fn run(
        &self,
        items: &Sequences,
        observer: Option<&mut dyn Observer>,
    ) -> Result<ModelOutput> {
        let ran = match (&self.model, items) {
            (Model::Switch(model), Sequences::Pairs(pairs)) => {
                ModelOutput { hidden: model.run(pairs, observer)?, head: model.head()? }
            }
            (Model::Causal(model), Sequences::Causal(windows)) => {
                ModelOutput { hidden: model.run(windows, observer)?, head: model.head()? }
            }
            _ => return Err(crate::Error::shape("kind of windows", "the model's", "another's")),
        };
        // The embedding and the output projection, which belong to no layer.
        TensorSource::release(self.checkpoint, "");
        Ok(ran)
    }
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Causal(windows) => windows.len(),
            Self::Pairs(pairs) => pairs.len(),
        }
    }

    /// What the scored rows of window `w` are to predict.
    pub(crate) fn targets(&self, w: usize) -> &[u32] {
        match self {
            Self::Causal(windows) => &windows[w][1..],
            Self::Pairs(pairs) => &pairs[w].1,
        }
    }
}

impl ModelOutput {
    /// The states that predict the targets of window `w`: `(targets, d_model)`.
    pub(crate) fn states(&self, w: usize, targets: usize) -> ArrayView2<'_, f32> {
        let start = self.hidden.windows[w].start;
        self.hidden.states.slice(s![start..start + targets, ..])
    }
}
