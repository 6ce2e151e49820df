//! Text that a model writes itself, to calibrate on.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::tokens::{TextTokens, Tokens};
use crate::calibrate::text::{OwnTextOptions, plain_tokens};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::forward::{Model, SampleOptions};
use crate::model::Stack;
use crate::stage::Context;

/// Text of the model's own, for calibration: sequences that begin with a random token and go on by
/// sampling. First tokens are drawn without replacement from all ids that stand for text, so that
/// the sequences are spread over what the model can write; special tokens are never drawn.
///
/// A model can be asked about any input. Text that it writes shows its layers inputs that a
/// calibration text of one kind does not, and so keeps a fit from losing what that text does not
/// show.
///
/// All sequences are written side by side, one position after another, and the layers that do not
/// fit in half of [`OwnTextOptions::memory`] are read again for every position. The tokens do not
/// depend on that memory, nor on the number of threads.
///
/// # Cost
/// A forward pass over all tokens, and reading the model once for each position of a sequence.
///
/// # Memory
/// [`OwnTextOptions::memory`], one layer, the embedding and the output projection.
///
/// # Source
/// Self-calibration (Williams et al., NAACL 2025, arXiv 2410.17170), there for quantisation and
/// pruning of dense models.
///
/// # Errors
/// [`ErrorKind::OutOfRange`] for fewer tokens than one sequence, or a length or temperature that
/// cannot be; [`ErrorKind::Unsupported`] for an encoder-decoder model, or a family without a native
/// forward pass; those of the checkpoint.
pub fn own_text(source: &Checkpoint, options: &OwnTextOptions, cx: &Context) -> Result<Tokens> {
    let model = Model::open_on(source, cx.clone()).in_file(&source.dir().join("config.json"))?;
    let Model::Causal(model) = &model else {
        let (found, supported) = ("an encoder-decoder model".into(), "decoder-only models".into());
        let what = "text of the model's own";
        return Err(ErrorKind::Unsupported { what, found, supported }.into());
    };
    let count = options.tokens / options.length.max(1);
    if options.length < 2 || count == 0 {
        let expected = format!("one sequence of {} or more", options.length.max(2));
        return Err(Error::range("tokens of own text", expected, options.tokens));
    }
    let allowed = plain_tokens(source.dir(), model.spec().vocab, &special_ids(source)?)?;
    let first = first_tokens(&allowed, count, options.seed)?;
    let half = options.memory / 2;
    let layer = 4 * source.total_parameters() / model.spec().layers.max(1) as u64;
    let side_by_side = half / model.state_bytes(options.length).max(1);
    let mut sample = SampleOptions {
        length: options.length,
        temperature: options.temperature,
        allowed,
        seed: options.seed,
        first_stream: 0,
        held_layers: usize::try_from(half / layer.max(1)).unwrap_or(usize::MAX),
    };
    let mut windows = Vec::with_capacity(count);
    for prompts in first.chunks(usize::try_from(side_by_side).unwrap_or(usize::MAX).max(1)) {
        windows.extend(model.sample(prompts, &sample)?);
        sample.first_stream += prompts.len() as u64;
    }
    Ok(Tokens::from(windows))
}

impl TextTokens {
    /// The same with text that the model writes itself behind it: see [`own_text`].
    ///
    /// # Errors
    /// Those of [`own_text`].
    pub fn with_own_text(
        mut self,
        source: &Checkpoint,
        options: &OwnTextOptions,
        cx: &Context,
    ) -> Result<Self> {
        let own = own_text(source, options, cx)?;
        let tokens = own.of(Stack::Causal);
        if let (Tokens::Windows(all), Tokens::Windows(own)) = (&mut self.tokens, own) {
            self.record.add_own_text(options, own.len() as u64, tokens);
            all.extend(own);
        }
        Ok(self)
    }
}

/// The special tokens that `config.json` names.
fn special_ids(source: &Checkpoint) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        let Some(value) = source.config().get(key) else { continue };
        let all = value.as_array().map_or(std::slice::from_ref(value), |list| &list[..]);
        ids.extend(all.iter().filter_map(|id| id.as_u64()).filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(ids)
}

/// `count` prompts of one token: every allowed id once in a drawn order, then again.
fn first_tokens(allowed: &[bool], count: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    let ids = allowed.iter().enumerate().filter(|(_, allowed)| **allowed);
    let mut ids: Vec<u32> = ids.map(|(id, _)| id as u32).collect();
    if ids.is_empty() {
        return Err(Error::range("token ids that stand for text", "at least one", 0));
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    // The sequences have the streams from 0 up.
    generator.set_stream(u64::MAX);
    ids.shuffle(&mut generator);
    Ok(ids.into_iter().cycle().take(count).map(|id| vec![id]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_tokens_are_spread_before_any_comes_again() {
        let allowed = [false, true, true, false, true];
        let firsts = |count| first_tokens(&allowed, count, 3).unwrap().concat();
        let mut once = firsts(3);
        assert_eq!(firsts(5)[..3], once[..]);
        assert_eq!(firsts(5)[3..], once[..2]);
        once.sort_unstable();
        assert_eq!(once, [1, 2, 4]);
        assert!(first_tokens(&[false; 4], 1, 3).is_err());
    }
}
