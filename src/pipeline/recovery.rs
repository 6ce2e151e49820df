//! Recovery on text: the second pass follows the compressed model.
//!
//! Layer `l` sees what the layers before it, merged and recovered, make of the text, and is fitted
//! to what the original layer `l` gives on the same input (NAEE's progressive order, arXiv
//! 2402.14800; GPTQ's). So each layer also makes up for what those before it lost.

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use super::bookmark::Bookmarks;
use super::builder::Pipeline;
use super::compress::Given;
use super::compressor::Ranks;
use super::engine::{self, Measured};
use super::job::Job;
use super::pass::{Block, Pass};
use super::passes::Decided;
use super::report::{LayerReport, OutputError};
use super::singular;
use super::tokens::{CalibrateOptions, Tokens};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Locate, Result};
use crate::forward::Choice;
use crate::model::{Grouping, LayerId, MergedLayer, MoeLayer};
use crate::stage::Recovery;

/// One in this many tokens judges; the others are fitted.
const JUDGES: usize = 10;

/// How many of `t` tokens no fit may see.
pub(super) fn held_out(t: usize) -> usize {
    t / JUDGES
}

/// Every tenth row moved behind the others, `held` of them: samples lie in the order of the text,
/// whose end may be of another kind than its beginning.
pub(super) fn tail_like_the_rest(
    inputs: &Array2<f32>,
    targets: &Array2<f32>,
    held: usize,
) -> (Array2<f32>, Array2<f32>) {
    let judges = |i: &usize| i % JUDGES == JUDGES - 1 && i / JUDGES < held;
    let rows = 0..inputs.nrows();
    let order: Vec<usize> =
        rows.clone().filter(|i| !judges(i)).chain(rows.filter(judges)).collect();
    (inputs.select(Axis(0), &order), targets.select(Axis(0), &order))
}

/// What a layer gets and gave, batch by batch of windows.
#[derive(Default)]
struct Seen {
    inputs: Vec<Array2<f32>>,
    targets: Vec<Array2<f32>>,
    windows: Vec<Vec<std::ops::Range<usize>>>,
}

impl Seen {
    /// Inputs and targets of all windows, every tenth window behind the others, and its rows. A
    /// whole window judges or none of it: its tokens are too alike to judge each other.
    fn split(&self) -> Result<(Array2<f32>, Array2<f32>, usize)> {
        let all = || {
            let batches = self.windows.iter().enumerate();
            batches.flat_map(|(b, windows)| windows.iter().map(move |w| (b, w.clone())))
        };
        if all().count() < JUDGES {
            let (inputs, targets) = (joined(&self.inputs)?, joined(&self.targets)?);
            let held = held_out(inputs.nrows());
            let (inputs, targets) = tail_like_the_rest(&inputs, &targets, held);
            return Ok((inputs, targets, held));
        }
        let judges = |(i, _): &(usize, _)| i % JUDGES == JUDGES - 1;
        let fitted = all().enumerate().filter(|w| !judges(w));
        let judging = all().enumerate().filter(judges);
        let held = judging.clone().map(|(_, (_, rows))| rows.len()).sum();
        let order: Vec<_> = fitted.chain(judging).map(|(_, window)| window).collect();
        let pick = |from: &[Array2<f32>]| {
            let rows: Vec<ArrayView2<'_, f32>> =
                order.iter().map(|(b, rows)| from[*b].slice(s![rows.clone(), ..])).collect();
            concatenate(Axis(0), &rows).map_err(misfit)
        };
        Ok((pick(&self.inputs)?, pick(&self.targets)?, held))
    }
}

fn joined(parts: &[Array2<f32>]) -> Result<Array2<f32>> {
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    concatenate(Axis(0), &views).map_err(misfit)
}

fn misfit(error: ndarray::ShapeError) -> Error {
    Error::shape("batches of one width", "the same width", error)
}

impl Pipeline {
    /// Second pass along the text: merges, recovers and hands on layer by layer, from the layer
    /// behind the bookmark `from` on. Bookmarks are set in the folder of `options`.
    ///
    /// # Memory
    /// The layer, its merged experts and what the recoverer holds; the hidden states; and of the
    /// layer at hand inputs and targets of all tokens, `16 t d_model` bytes.
    pub(super) fn follow(
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
        let wanted = |id| decided.ids.contains(&id);
        let mut pass = Pass::new(job.source, tokens, options, wanted)?;
        let mut bookmarks = Bookmarks::new(&options.scratch);
        if let Some(id) = from {
            bookmarks.open(&mut pass, id)?;
        }
        self.hand_on(decided, job.observer, sink, &mut |measured, grouping| {
            let made = self.reach(&mut pass, measured, grouping, decided.ranks.as_ref(), job)?;
            bookmarks.set(&mut pass, measured.summary.id)?;
            Ok(made)
        })
    }

    /// Runs up to the layer of `measured`, merges and recovers it, and runs through the result.
    fn reach(
        &self,
        pass: &mut Pass<'_, Checkpoint>,
        measured: &Measured,
        grouping: &Grouping,
        kept: Option<&Ranks>,
        job: &Job<'_>,
    ) -> Result<(MergedLayer, LayerReport)> {
        while let Some(mut block) = pass.next()? {
            if block.id() == measured.summary.id {
                return self.recovered(pass, &mut block, measured, grouping, kept, job);
            }
            pass.each(|hidden, encoded| {
                block.attend(hidden, encoded, &self.cx)?;
                block.feed().forward(&mut hidden.states, &hidden.windows, None, &self.cx)
            })?;
        }
        Err(Error::range("layer", "one of the model's, in order", measured.summary.id))
    }

    fn recovered(
        &self,
        pass: &mut Pass<'_, Checkpoint>,
        block: &mut Block,
        measured: &Measured,
        grouping: &Grouping,
        kept: Option<&Ranks>,
        job: &Job<'_>,
    ) -> Result<(MergedLayer, LayerReport)> {
        let (seen, layer) = self.look(pass, block)?;
        let plan = super::policy::Plan { recoverer: None, compressor: None, ..self.plan(false) };
        let compressor = self.compressor.as_ref();
        let ranks = compressor.map(|c| c.original(&layer, grouping, &self.cx)).transpose()?;
        let stats = job.stats.layer(&measured.summary.id, plan.merge_needs())?;
        let merged = engine::merge_layer(layer, &stats, measured, grouping, &plan, &self.cx)?;
        let (mut merged, mut report) = merged;
        let narrowed = self.router.is_some();
        {
            let (inputs, targets, held_out) = seen.split()?;
            let (inputs, targets) = (inputs.view(), targets.view());
            let task = Recovery { inputs, targets, narrowed, held_out };
            if let Some(recoverer) = &self.recoverer {
                merged = recoverer.recover(&task, merged, &self.cx)?;
                singular::merged(&mut report.spectra, &merged.experts, &self.cx)?;
            }
            if let (Some(compressor), Some(ranks)) = (compressor, ranks) {
                let seen = Some(inputs.slice(s![..task.fitted(), ..]));
                let given = Given { inputs: seen, narrowed, ranks: kept, ..Given::default() };
                let done = compressor.compress(merged, &ranks, given, &self.cx)?;
                (merged, report.compression) = (done.0, Some(done.1));
                singular::compressed(&mut report.spectra, &merged.experts, &self.cx)?;
            }
            let error = task.error(&merged, &self.cx)?;
            report.output_error = Some(match narrowed {
                true => OutputError {
                    mapped: Recovery { narrowed: false, ..task }.error(&merged, &self.cx)?,
                    narrowed: Some(error),
                },
                false => OutputError { mapped: error, narrowed: None },
            });
        }
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

    /// Runs the text up to the experts of a layer, and takes them out of it.
    fn look(&self, pass: &mut Pass<'_, Checkpoint>, block: &mut Block) -> Result<(Seen, MoeLayer)> {
        let id = block.id();
        let mut seen = Seen::default();
        pass.each(|hidden, encoded| {
            block.attend(hidden, encoded, &self.cx)?;
            let x = block.feed().input(hidden.states.view())?;
            let output = block.feed().routed(x.view(), &hidden.windows, &self.cx)?;
            seen.targets.extend(output);
            seen.inputs.push(x);
            seen.windows.push(hidden.windows.clone());
            Ok(())
        })?;
        let missing = || Error::range("layer to recover", "sparse and not merged before", id);
        let layer = block.take_moe().ok_or_else(missing).in_layer(id)?;
        Ok((seen, layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tenth_row_or_window_judges() {
        let rows = Array2::from_shape_fn((25, 1), |(i, _)| i as f32);
        let (inputs, targets) = tail_like_the_rest(&rows, &rows, held_out(25));
        assert_eq!(inputs, targets);
        assert_eq!(inputs.column(0).to_vec()[21..], [23.0, 24.0, 9.0, 19.0]);
        let parts = vec![rows.clone(), rows];
        let windows = vec![(0..5).map(|i| i * 5..i * 5 + 5).collect(); 2];
        let seen = Seen { inputs: parts.clone(), targets: parts, windows };
        let (inputs, _, held) = seen.split().unwrap();
        assert_eq!((inputs.nrows(), held), (50, 5));
        assert_eq!(inputs.column(0).to_vec()[45..], [20.0, 21.0, 22.0, 23.0, 24.0]);
    }
}
