//! Samples in the making: rows are appended, never copied again.

use ndarray::{Array2, ArrayView2};

use super::collector::Batch;
use crate::error::{Error, Result};
use crate::model::{Routing, Samples};

/// Rows of the tokens that were kept as samples.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// How many samples of how many tokens; `None` keeps every token.
    share: Option<(u64, u64)>,
    /// Tokens so far that count.
    seen: u64,
    rows: usize,
    /// Widths: inputs, logits, routing.
    widths: [usize; 3],
    inputs: Vec<f32>,
    logits: Vec<f32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    output: Vec<f32>,
}

impl Rows {
    /// At most `most` rows, spread evenly over `of` tokens.
    pub(super) fn spread(most: usize, of: u64) -> Self {
        let most = most as u64;
        Self { share: (most < of).then_some((most, of)), ..Self::default() }
    }

    /// Whether the next token is among the evenly spread ones: `⌊(s+1) m / T⌋ > ⌊s m / T⌋`.
    fn takes_next(&mut self) -> bool {
        let at = u128::from(self.seen);
        self.seen += 1;
        match self.share {
            None => true,
            Some((most, of)) => {
                let up_to = |s: u128| s * u128::from(most) / u128::from(of);
                at < u128::from(of) && up_to(at + 1) > up_to(at)
            }
        }
    }

    /// Appends the tokens of a batch that are due, count, and had none of their choices dropped.
    pub(super) fn add(&mut self, batch: &Batch<'_>) {
        let routing = batch.routing;
        self.widths = [batch.inputs.ncols(), batch.logits.ncols(), routing.experts.ncols()];
        for t in 0..batch.inputs.nrows() {
            let counts = batch.mask.is_none_or(|mask| mask[t]);
            if !counts || !self.takes_next() {
                continue;
            }
            if batch.kept.is_some_and(|kept| kept.row(t).iter().any(|&room| !room)) {
                continue;
            }
            self.rows += 1;
            self.experts.extend(routing.experts.row(t));
            let floats: [(&mut Vec<f32>, Option<ArrayView2<'_, f32>>); 4] = [
                (&mut self.inputs, Some(batch.inputs)),
                (&mut self.logits, Some(batch.logits)),
                (&mut self.weights, Some(routing.weights.view())),
                (&mut self.output, batch.output),
            ];
            for (rows, array) in floats {
                rows.extend(array.iter().flat_map(|array| array.row(t).to_vec()));
            }
        }
    }

    /// The samples; the routed outputs only if every batch had them.
    pub(super) fn finish(self) -> Result<Samples> {
        let [d, n, k] = self.widths;
        let rows = self.rows;
        let shape = |width: usize, values: Vec<f32>| {
            let found = values.len();
            Array2::from_shape_vec((rows, width), values)
                .map_err(|_| Error::shape("samples", (rows, width), found))
        };
        let experts = Array2::from_shape_vec((rows, k), self.experts)
            .map_err(|_| Error::shape("samples", (rows, k), "another number of choices"))?;
        let observed = self.output.len() == rows * d;
        Ok(Samples {
            inputs: shape(d, self.inputs)?,
            logits: shape(n, self.logits)?,
            routing: Routing { experts, weights: shape(k, self.weights)? },
            routed_output: observed.then(|| shape(d, self.output)).transpose()?,
        })
    }
}
