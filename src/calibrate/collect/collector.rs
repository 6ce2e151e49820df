//! From what passes by to what is known: statistics of one layer, batch by batch.

use ndarray::{Array2, ArrayView2, Axis};

use super::sample_rows::Rows;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Expert, MergedLayer, OutputSums, Routing, RoutingStats};
use crate::par;
use crate::stage::{Context, Needs};

/// Tokens that one task sends through an expert.
const BLOCK: usize = 512;

/// What a batch of `t` tokens showed of a layer with `n` router rows.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `(t, d_model)` inputs of the MoE block, after the layer norm.
    pub inputs: ArrayView2<'a, f32>,
    /// `(t, n)` router logits, as the router gives them.
    pub logits: ArrayView2<'a, f32>,
    /// `(t, k)` chosen experts and the weights that the model applies.
    pub routing: &'a Routing,
    /// `(t, k)` whether the expert had room for the token; `None` without a capacity.
    pub kept: Option<ArrayView2<'a, bool>>,
    /// `(t, d_model)` outputs of the routed experts, for samples.
    pub output: Option<ArrayView2<'a, f32>>,
    /// For each expert of the layer its outputs before the weights, over the tokens that found
    /// room. `None`, or with a mask: the collector sends the tokens through the experts itself.
    pub outputs: Option<&'a [OutputSums]>,
    /// `(t)` which tokens count; padding does not. `None`: all do.
    pub mask: Option<&'a [bool]>,
}

/// Turns batches of observations of one layer into its [`RoutingStats`].
///
/// With `X_i` the tokens that chose expert `i` and found room, `g_i` the applied weight and `E_i`
/// the unweighted output, it sums over all tokens that count, in `f64`:
///
/// | part | formula |
/// |---|---|
/// | counts | `c_i = ⎸X_i⎹` |
/// | logit Gram | `Zᵀ Z`, dropped choices included |
/// | router mass | `Σ_{X_i} g_i(x)` |
/// | output norm (EAN) | `1/c_i Σ_{X_i} ‖E_i(x)‖₂` |
/// | REAP | `1/c_i Σ_{X_i} g_i(x) ‖E_i(x)‖₂` |
/// | mean output | `1/c_i Σ_{X_i} E_i(x)` |
///
/// Only what was asked for is computed. The last three come with a batch of a watched forward pass
/// ([`Batch::outputs`]); else every token goes through its experts once more.
///
/// Sums are added in fixed blocks and in order: the same batches give the same bits at any number
/// of threads. Norms and saliencies are rounded to `f32` at the end.
///
/// # Memory
/// `8 n (n + d_model + 4)` bytes of sums; `4 s (2 d_model + n + 2 k)` bytes of `s` samples; while a
/// batch without outputs is added `4 · 512 · (2 d_model + 2 d_ff)` bytes per thread.
#[derive(Debug)]
pub struct Collector {
    needs: Needs,
    samples: Rows,
    tokens: u64,
    counts: Vec<u64>,
    gram: Option<Array2<f64>>,
    mass: Vec<f64>,
    sums: Vec<Sums>,
    width: usize,
}

/// Sums over an expert's tokens.
#[derive(Debug, Clone)]
struct Sums {
    norm: f64,
    reap: f64,
    /// `(d_model)`; empty unless mean outputs are needed.
    output: Vec<f64>,
}

impl Collector {
    /// Collects what `needs` asks for; [`Needs::EXPERTS`] is not a statistic and ignored. All
    /// tokens become samples if samples are needed, unless [`Collector::sample`] bounds them.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] for gradients and Fisher information, which no forward pass gives.
    pub fn new(needs: Needs) -> Result<Self> {
        let beyond = needs.without(Needs::OBSERVABLE | Needs::EXPERTS);
        if beyond != Needs::NONE {
            let needs = beyond.names().collect::<Vec<_>>().join(", ");
            let remedy =
                "no forward pass gives them: take a statistics file that holds them".into();
            return Err(ErrorKind::Missing { stage: "the recipe".into(), needs, remedy }.into());
        }
        Ok(Self {
            needs,
            samples: Rows::default(),
            tokens: 0,
            counts: Vec::new(),
            gram: None,
            mass: Vec::new(),
            sums: Vec::new(),
            width: 0,
        })
    }

    /// Keeps at most `most` samples, spread evenly over the `of` tokens that are to come.
    #[must_use]
    pub fn sample(mut self, most: usize, of: u64) -> Self {
        self.samples = Rows::spread(most, of);
        self
    }

    /// Whether something that was asked for is made of the experts' unweighted outputs.
    pub fn needs_outputs(&self) -> bool {
        let outputs = [Needs::OUTPUT_NORM, Needs::REAP, Needs::MEAN_OUTPUT];
        outputs.into_iter().any(|need| self.needs.contains(need))
    }

    /// Adds a batch of the layer's tokens. Batches must come in the order of the text.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`] when the parts of the batch do not fit each other or the layer,
    /// [`ErrorKind::OutOfRange`] for a choice that is no expert, with the expert.
    pub fn add(&mut self, layer: &MergedLayer, batch: &Batch<'_>, cx: &Context) -> Result<()> {
        self.check(layer, batch)?;
        let n = layer.router.experts();
        let visits = visits(batch, n)?;
        self.counts.resize(n, 0);
        self.mass.resize(n, 0.0);
        for (i, visits) in visits.iter().enumerate() {
            self.counts[i] += visits.len() as u64;
            self.mass[i] += visits.iter().map(|(_, w)| f64::from(*w)).sum::<f64>();
        }
        if self.needs.contains(Needs::LOGIT_GRAM) {
            let gram = self.gram.get_or_insert_with(|| Array2::zeros((n, n)));
            match batch.mask {
                None => cx.compute().add_gram(batch.logits, gram)?,
                Some(mask) => {
                    let rows: Vec<usize> = (0..mask.len()).filter(|&t| mask[t]).collect();
                    cx.compute().add_gram(batch.logits.select(Axis(0), &rows).view(), gram)?;
                }
            }
        }
        self.add_outputs(layer, batch, &visits, cx)?;
        if self.needs.contains(Needs::SAMPLES) {
            self.samples.add(batch);
        }
        let masked = batch.mask.map_or(0, |mask| mask.iter().filter(|&&m| !m).count());
        self.tokens += (batch.inputs.nrows() - masked) as u64;
        Ok(())
    }

    fn check(&self, layer: &MergedLayer, batch: &Batch<'_>) -> Result<()> {
        let (t, n, d) =
            (batch.inputs.nrows(), layer.router.experts(), layer.router.weight().ncols());
        let k = batch.routing.experts.ncols();
        let known = if self.counts.is_empty() { n } else { self.counts.len() };
        let expect = |what, expected: (usize, usize), found| {
            if expected == found { Ok(()) } else { Err(Error::shape(what, expected, found)) }
        };
        expect("statistics of one layer", (known, 1), (n, 1))?;
        expect("layer inputs", (t, d), batch.inputs.dim())?;
        expect("router logits", (t, n), batch.logits.dim())?;
        expect("chosen experts", (t, k), batch.routing.experts.dim())?;
        expect("applied weights", (t, k), batch.routing.weights.dim())?;
        expect("capacity mask", (t, k), batch.kept.map_or((t, k), |kept| kept.dim()))?;
        expect("routed output", (t, d), batch.output.map_or((t, d), |output| output.dim()))?;
        expect("token mask", (t, 1), (batch.mask.map_or(t, <[bool]>::len), 1))
    }

    /// What needs the unweighted outputs of the experts.
    fn add_outputs(
        &mut self,
        layer: &MergedLayer,
        batch: &Batch<'_>,
        visits: &[Vec<(usize, f32)>],
        cx: &Context,
    ) -> Result<()> {
        let mean = self.needs.contains(Needs::MEAN_OUTPUT);
        self.width = batch.inputs.ncols();
        if !self.needs_outputs() {
            return Ok(());
        }
        let empty =
            Sums { norm: 0.0, reap: 0.0, output: vec![0.0; if mean { self.width } else { 0 }] };
        self.sums.resize(visits.len(), empty);
        if let Some(outputs) = batch.outputs.filter(|_| batch.mask.is_none()) {
            return self.take_outputs(layer, outputs, visits);
        }
        let labels = layer.grouping.labels();
        let mut jobs = Vec::new();
        for (row, visits) in visits.iter().enumerate() {
            let Some(expert) = labels.get(row).copied().flatten() else { continue };
            let expert = &layer.experts[expert];
            jobs.extend(visits.chunks(BLOCK).map(|visits| Job { row, expert, visits, mean }));
        }
        let single = cx.per_task();
        let parts =
            par::map(jobs.len(), |i| jobs[i].run(batch.inputs, &single).in_expert(jobs[i].row))?;
        for (job, part) in jobs.iter().zip(parts) {
            let sums = &mut self.sums[job.row];
            sums.norm += part.norm;
            sums.reap += part.reap;
            sums.output.iter_mut().zip(part.output).for_each(|(sum, y)| *sum += y);
        }
        Ok(())
    }

    /// Adds outputs that the forward pass has summed up.
    fn take_outputs(
        &mut self,
        layer: &MergedLayer,
        outputs: &[OutputSums],
        visits: &[Vec<(usize, f32)>],
    ) -> Result<()> {
        let labels = layer.grouping.labels();
        for (row, (sums, visits)) in self.sums.iter_mut().zip(visits).enumerate() {
            let Some(seen) = labels.get(row).copied().flatten().and_then(|e| outputs.get(e)) else {
                continue;
            };
            if seen.norms.len() != visits.len() {
                let (expected, found) = (visits.len(), seen.norms.len());
                return Err(Error::shape("outputs per visit", expected, found)).in_expert(row);
            }
            for (norm, (_, weight)) in seen.norms.iter().zip(visits) {
                sums.norm += norm;
                sums.reap += f64::from(*weight) * norm;
            }
            sums.output.iter_mut().zip(&seen.sum).for_each(|(sum, y)| *sum += y);
        }
        Ok(())
    }

    /// The statistics of all batches.
    ///
    /// # Errors
    /// [`ErrorKind::NotFinite`] when a value overflowed; [`ErrorKind::Statistics`] when there was
    /// no batch.
    pub fn finish(self) -> Result<RoutingStats> {
        let n = self.counts.len();
        if n == 0 {
            let reason = "no token was observed".into();
            return Err(ErrorKind::Statistics { reason }.into());
        }
        let asked = |need| self.needs.contains(need);
        let mean = |sum: f64, i: usize| {
            if self.counts[i] == 0 { 0.0 } else { sum / self.counts[i] as f64 }
        };
        // As precise as a statistics file holds them, so that a run on text and one on the file of
        // that text are the same.
        let rounded = |x: f64| f64::from(x as f32);
        let per_expert = |of: fn(&Sums) -> f64| -> Vec<f64> {
            self.sums.iter().enumerate().map(|(i, sums)| rounded(mean(of(sums), i))).collect()
        };
        let stats = RoutingStats {
            tokens: self.tokens,
            logit_gram: self.gram,
            router_mass: asked(Needs::ROUTER_MASS).then_some(self.mass),
            output_norm: asked(Needs::OUTPUT_NORM).then(|| per_expert(|s| s.norm)),
            reap: asked(Needs::REAP).then(|| per_expert(|s| s.reap)),
            mean_output: asked(Needs::MEAN_OUTPUT).then(|| {
                Array2::from_shape_fn((n, self.width), |(i, j)| {
                    mean(self.sums[i].output[j], i) as f32
                })
            }),
            samples: asked(Needs::SAMPLES).then(|| self.samples.finish()).transpose()?,
            counts: self.counts.clone(),
            ..RoutingStats::default()
        };
        stats.validate(n, self.width)?;
        Ok(stats)
    }
}

/// For each router row the tokens that count and were not dropped, ascending, and their weights.
fn visits(batch: &Batch<'_>, n: usize) -> Result<Vec<Vec<(usize, f32)>>> {
    let mut visits = vec![Vec::new(); n];
    let rows = batch.routing.experts.rows().into_iter().zip(batch.routing.weights.rows());
    for (t, (chosen, weights)) in rows.enumerate() {
        if batch.mask.is_some_and(|mask| !mask[t]) {
            continue;
        }
        for (slot, (&expert, &weight)) in chosen.iter().zip(weights).enumerate() {
            if batch.kept.is_some_and(|kept| !kept[[t, slot]]) {
                continue;
            }
            let Some(of_expert) = visits.get_mut(expert as usize) else {
                return Err(Error::range("chosen expert", format!("below {n}"), expert));
            };
            of_expert.push((t, weight));
        }
    }
    Ok(visits)
}

/// A block of one expert's tokens.
struct Job<'a> {
    row: usize,
    expert: &'a Expert,
    visits: &'a [(usize, f32)],
    mean: bool,
}

impl Job<'_> {
    fn run(&self, inputs: ArrayView2<'_, f32>, cx: &Context) -> Result<Sums> {
        let tokens: Vec<usize> = self.visits.iter().map(|(t, _)| *t).collect();
        let x = inputs.select(Axis(0), &tokens);
        let outputs = self.expert.view().forward(x.view(), cx.compute())?;
        let width = if self.mean { outputs.ncols() } else { 0 };
        let mut sums = Sums { norm: 0.0, reap: 0.0, output: vec![0.0; width] };
        for (y, (_, weight)) in outputs.rows().into_iter().zip(self.visits) {
            let norm = y.iter().map(|&y| f64::from(y) * f64::from(y)).sum::<f64>().sqrt();
            sums.norm += norm;
            sums.reap += f64::from(*weight) * norm;
            sums.output.iter_mut().zip(y).for_each(|(sum, &y)| *sum += f64::from(y));
        }
        Ok(sums)
    }
}
