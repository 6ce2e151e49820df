//! Text that a decoder-only model writes itself: many short sequences side by side.

use ndarray::{Array2, ArrayView1, Axis};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::mixer::SequenceState;
use super::{Causal, DecoderLayer};
use crate::error::{Error, Result};
use crate::forward::head::Head;
use crate::forward::math::exp_shifted;
use crate::forward::windows::gather;
use crate::model::{Finite, TensorSource};
use crate::par;

/// What is sampled, and how.
#[derive(Debug, Clone)]
pub struct SampleOptions {
    /// Tokens of a finished sequence, its prompt included; at least those of the prompt.
    pub length: usize,
    /// Divides the logits; above 0. At 1 the model writes what it believes.
    pub temperature: f64,
    /// Whether a token may be drawn: one flag for each id. Others are never drawn.
    pub allowed: Vec<bool>,
    /// Seed of the generator; sequence `i` draws from its stream `first_stream + i`.
    pub seed: u64,
    /// The stream of the first sequence: what is sampled in several calls is what one call gives.
    pub first_stream: u64,
    /// The first so many layers stay in memory; the others are read again for every position.
    pub held_layers: usize,
}

impl<S: TensorSource> Causal<S> {
    /// Continues every prompt by sampling, all of them side by side: position by position, and at
    /// each position layer by layer. Prompts are of one length. The tokens do not depend on the
    /// number of threads, nor on [`SampleOptions::held_layers`].
    ///
    /// # Cost
    /// That of a forward pass over all tokens, and of reading the layers that are not held once for
    /// every position.
    ///
    /// # Memory
    /// The layers that are held, one layer more, embedding and output projection, and keys and
    /// values: `4 · sequences · length · (d_key + d_value)` bytes for each layer.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for prompts that are empty or of different
    /// lengths, a length below that of the prompts or above the model's context, a temperature that
    /// is not above 0, or no token that may be drawn; those of [`Causal::embed`] and
    /// [`Causal::layer`].
    pub fn sample(&self, prompts: &[Vec<u32>], options: &SampleOptions) -> Result<Vec<Vec<u32>>> {
        let Some(first) = prompts.first() else { return Ok(Vec::new()) };
        self.check_sample(prompts, first.len(), options)?;
        let mut writer = Writer::new(self, prompts.len(), options)?;
        let mut sequences = prompts.to_vec();
        for position in 0..options.length.saturating_sub(1) {
            let tokens: Vec<u32> = sequences.iter().map(|sequence| sequence[position]).collect();
            let wanted = position + 1 == sequences[0].len();
            let hidden = writer.step(&tokens)?;
            if wanted {
                for (sequence, token) in sequences.iter_mut().zip(writer.draw(&hidden)?) {
                    sequence.push(token);
                }
            }
        }
        Ok(sequences)
    }

    /// Bytes that are kept of one sequence of `length` tokens while it is continued, over all
    /// layers: keys and values, or the state of another mixer.
    pub fn state_bytes(&self, length: usize) -> u64 {
        4 * self.spec().mixers.iter().map(|mixer| mixer.state_numbers(length) as u64).sum::<u64>()
    }

    fn check_sample(
        &self,
        prompts: &[Vec<u32>],
        prompt: usize,
        options: &SampleOptions,
    ) -> Result<()> {
        for tokens in prompts {
            if tokens.len() != prompt {
                return Err(Error::range("tokens of a prompt", prompt, tokens.len()));
            }
            self.check(tokens)?;
        }
        let longest = self.spec().longest_window;
        if !(prompt..=longest).contains(&options.length) {
            let expected = format!("{prompt} to {longest} tokens");
            return Err(Error::range("length of a sequence", expected, options.length));
        }
        if !options.temperature.is_finite() || options.temperature <= 0.0 {
            return Err(Error::range("temperature", "above 0", options.temperature));
        }
        let vocab = self.spec().vocab;
        if options.allowed.len() != vocab {
            return Err(Error::shape("flags of tokens", vocab, options.allowed.len()));
        }
        if options.allowed.contains(&true) {
            Ok(())
        } else {
            Err(Error::range("tokens that may be drawn", "at least one", 0))
        }
    }
}

/// Sequences of one length, on their way.
struct Writer<'a, S> {
    model: &'a Causal<S>,
    options: &'a SampleOptions,
    table: Array2<f32>,
    head: Head,
    held: Vec<DecoderLayer>,
    /// One a layer, from its first step on.
    states: Vec<Option<SequenceState>>,
    /// One a sequence.
    generators: Vec<ChaCha8Rng>,
}

impl<'a, S: TensorSource> Writer<'a, S> {
    fn new(model: &'a Causal<S>, sequences: usize, options: &'a SampleOptions) -> Result<Self> {
        let layers = model.spec().layers;
        let generator = |stream: usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(options.seed);
            generator.set_stream(options.first_stream.wrapping_add(stream as u64));
            generator
        };
        Ok(Self {
            model,
            options,
            table: model.table()?,
            head: model.head()?,
            held: (0..layers.min(options.held_layers))
                .map(|i| model.layer(i))
                .collect::<Result<_>>()?,
            states: vec![None; layers],
            generators: (0..sequences).map(generator).collect(),
        })
    }

    /// The next token of every sequence through all layers: `(sequences, d_model)`.
    fn step(&mut self, tokens: &[u32]) -> Result<Array2<f32>> {
        let cx = self.model.context();
        let mut hidden = gather(&self.table, &[tokens]).states;
        let (sequences, room) = (tokens.len(), self.options.length);
        for (i, state) in self.states.iter_mut().enumerate() {
            let read;
            let layer = match self.held.get(i) {
                Some(layer) => layer,
                None => {
                    read = self.model.layer(i)?;
                    &read
                }
            };
            let state = state.get_or_insert_with(|| layer.start_each(sequences, room));
            layer.step_each(&mut hidden, state, cx)?;
        }
        Ok(hidden)
    }

    /// One token for each row of the last hidden states; a block of logits is held at a time.
    fn draw(&mut self, hidden: &Array2<f32>) -> Result<Vec<u32>> {
        let cx = self.model.context();
        let rows = self.head.rows_at_once();
        let mut tokens = Vec::with_capacity(hidden.nrows());
        for (block, generators) in
            hidden.axis_chunks_iter(Axis(0), rows).zip(self.generators.chunks_mut(rows))
        {
            let logits = self.head.logits(block, cx.compute())?;
            logits.check_finite("logits")?;
            let options = self.options;
            tokens.extend(par::map_mut(generators, |i, generator| {
                drawn(logits.row(i), options, generator.random::<f64>())
            })?);
        }
        Ok(tokens)
    }
}

/// The smallest id at which the summed probabilities of the allowed ids exceed `at`, of 0 to 1.
fn drawn(logits: ArrayView1<'_, f32>, options: &SampleOptions, at: f64) -> Result<u32> {
    let scale = (1.0 / options.temperature) as f32;
    let allowed = |id: usize| options.allowed.get(id).copied().unwrap_or(false);
    let masked = logits.iter().enumerate();
    let mut weights: Vec<f32> =
        masked.map(|(id, z)| if allowed(id) { z * scale } else { f32::NEG_INFINITY }).collect();
    exp_shifted(&mut weights);
    // The exponential is a little above 0 also for −∞.
    let weights = weights.into_iter().enumerate().filter(|&(id, _)| allowed(id));
    let total: f64 = weights.clone().map(|(_, weight)| f64::from(weight)).sum();
    let mut sum = 0.0;
    let mut last = None;
    for (id, weight) in weights {
        sum += f64::from(weight);
        last = Some(id as u32);
        if sum > at * total {
            break;
        }
    }
    last.ok_or_else(|| Error::range("tokens that may be drawn", "at least one", 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr1;

    fn options(allowed: &[bool], temperature: f64) -> SampleOptions {
        let allowed = allowed.to_vec();
        SampleOptions { length: 2, temperature, allowed, seed: 0, first_stream: 0, held_layers: 0 }
    }

    #[test]
    fn tokens_are_drawn_by_their_probability_and_only_if_allowed() {
        // Probabilities 1/2, 1/4, 1/4.
        let logits = arr1(&[2f32.ln(), 0.0, 0.0]);
        let all = options(&[true; 3], 1.0);
        let of = |at, options: &SampleOptions| drawn(logits.view(), options, at).unwrap();
        assert_eq!([0.0, 0.49, 0.51, 0.74, 0.76, 0.999].map(|at| of(at, &all)), [0, 0, 1, 1, 2, 2]);
        let two = options(&[false, true, true], 1.0);
        assert_eq!([0.0, 0.49, 0.51].map(|at| of(at, &two)), [1, 1, 2]);
        // A low temperature leaves the likeliest.
        assert_eq!(of(0.99, &options(&[true; 3], 0.05)), 0);
    }
}
