//! Greedy generation with a Switch model.

use ndarray::s;

use super::Switch;
use crate::error::Result;
use crate::forward::windows::gather;
use crate::model::{Stack, TensorSource};

impl<S: TensorSource> Switch<S> {
    /// The most likely targets for each of several inputs, one token at a time, until `max_new`
    /// tokens or the end token (which is included). Ties go to the smaller id.
    ///
    /// The encoder is streamed; the decoder's blocks are held in memory, and run anew over all
    /// tokens so far for each new one, so that expert capacity counts as in a teacher-forced pass.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode), [`decode`](Self::decode) and [`head`](Self::head).
    pub fn generate_each(
        &self,
        inputs: &[impl AsRef<[u32]>],
        max_new: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let encoded = self.encode(inputs, None)?;
        let table = self.table(Stack::Decoder)?;
        let blocks = (0..self.spec().decoder_layers).map(|i| self.block(Stack::Decoder, i));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let head = self.head()?;
        let greedy = |source: &std::ops::Range<usize>| {
            let source = std::slice::from_ref(source);
            let mut tokens = vec![self.spec().start];
            while tokens.len() <= max_new {
                let mut hidden = gather(&table, &[&tokens]);
                for block in &blocks {
                    let (states, windows) = (&mut hidden.states, &hidden.windows);
                    let encoded = Some((encoded.states.view(), source));
                    block.attention_half(states, windows, encoded, &self.cx)?;
                    block.feed().forward(states, windows, None, &self.cx)?;
                }
                let last = hidden.states.slice(s![tokens.len() - 1.., ..]);
                let token = head.largest(last, &self.cx)?;
                tokens.push(token);
                if self.spec().end.contains(&token) {
                    break;
                }
            }
            Ok(tokens.split_off(1))
        };
        encoded.windows.iter().map(greedy).collect()
    }
}
