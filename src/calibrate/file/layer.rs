//! One layer's statistics: read where the file has them, else computed from what it has.

use std::collections::BTreeMap;
use std::fs::File;

use ndarray::{Array2, Axis as Dim};

use super::stats_file::{Index, contradiction};
use super::tensor::Tensor;
use super::tensor_names::Axis;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::linalg::{Compute, Cpu};
use crate::model::{Activation, Expert, ExpertTensors, LayerId, Linear, Routing};
use crate::model::{RoutingStats, Samples};
use crate::stage::Needs;
use crate::tensor_file::TensorEntry;

/// Tokens whose logits or routing are in memory at a time.
const ROWS: usize = 4096;

/// A layer of an opened file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) id: LayerId,
    pub(super) index: &'a Index,
    pub(super) tensors: &'a BTreeMap<String, TensorEntry>,
    pub(super) file: &'a File,
}

impl Layer<'_> {
    /// Everything that `needs` asks for; the caller has checked that it can be had.
    pub(super) fn read(&self, needs: Needs) -> Result<RoutingStats> {
        let counts = self.counts()?;
        let gives = |need| needs.contains(need);
        let vector = |name| self.wide(name).map(Some);
        let mut stats = RoutingStats::from_counts(counts, self.index.tokens);
        if gives(Needs::LOGIT_GRAM) {
            stats.logit_gram = Some(self.logit_gram()?);
        }
        if gives(Needs::ROUTER_MASS) {
            stats.router_mass = Some(self.router_mass(&stats.counts)?);
        }
        if gives(Needs::OUTPUT_NORM) {
            stats.output_norm = vector("expert_out_norm")?;
        }
        if gives(Needs::REAP) {
            stats.reap = vector("reap_saliency")?;
        }
        if gives(Needs::MEAN_OUTPUT) {
            stats.mean_output = Some(self.matrix("expert_mean_output")?);
        }
        if gives(Needs::SAMPLES) {
            stats.samples = Some(self.samples()?);
        }
        if gives(Needs::GRADIENTS) {
            stats.gradients = Some(self.expert_tensors("grad")?);
        }
        if gives(Needs::FISHER) {
            stats.fisher = Some(self.fisher()?);
        }
        stats.validate(self.experts(), self.index.sizes.get(Axis::H).unwrap_or(0))?;
        Ok(stats)
    }

    fn experts(&self) -> usize {
        self.index.sizes.get(Axis::N).unwrap_or(0)
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.id)
    }

    fn find(&self, part: &str) -> Option<Tensor<'_>> {
        let TensorEntry { dtype, shape, range, .. } = self.tensors.get(&self.name(part))?;
        Some(Tensor { file: self.file, dtype: *dtype, shape, offset: range.start as u64 })
    }

    /// Reads a part with `read`; errors name its tensor.
    fn with<T>(&self, part: &str, read: impl FnOnce(Tensor<'_>) -> Result<T>) -> Result<T> {
        let absent = || contradiction("the tensor is absent".into());
        self.find(part).ok_or_else(absent).and_then(read).in_tensor(&self.name(part))
    }

    fn wide(&self, part: &str) -> Result<Vec<f64>> {
        self.with(part, |tensor| tensor.wide())
    }

    fn matrix(&self, part: &str) -> Result<Array2<f32>> {
        self.with(part, |t| matrix(t.shape[0], t.shape[1], t.floats(0..t.len())?))
    }

    /// Hands the rows of a per-token tensor to `f`, [`ROWS`] at a time: first row and values.
    fn rows<T>(
        &self,
        part: &str,
        read: impl Fn(&Tensor<'_>, std::ops::Range<usize>) -> Result<Vec<T>>,
        mut f: impl FnMut(usize, Vec<T>) -> Result<()>,
    ) -> Result<()> {
        self.with(part, |tensor| {
            let (rows, width) = (tensor.shape[0], tensor.shape[1]);
            for first in (0..rows).step_by(ROWS) {
                let last = (first + ROWS).min(rows);
                f(first, read(&tensor, first * width..last * width)?)?;
            }
            Ok(())
        })
    }

    /// The counts, checked against the choices of all tokens where the file has them: an expert
    /// counts its (token, slot) pairs, a capacity-dropped slot (−1) counts for none.
    fn counts(&self) -> Result<Vec<u64>> {
        let visits = self.find("topk_indices").map(|_| self.visits()).transpose()?;
        if self.find("counts").is_none() {
            return Ok(visits.unwrap_or_default());
        }
        self.with("counts", |tensor| {
            let given = tensor.integers(0..tensor.len())?;
            let counts: Vec<u64> = given.iter().map(|&c| self.count(c)).collect::<Result<_>>()?;
            for (e, (&count, visits)) in counts.iter().zip(visits.iter().flatten()).enumerate() {
                if count < *visits || (count > *visits && !self.index.sampled) {
                    let reason = format!("the top-k indices hold {visits}, the counts {count}");
                    return Err(contradiction(reason)).in_expert(e);
                }
            }
            let pairs: u128 = counts.iter().map(|&c| u128::from(c)).sum();
            let slots = self.index.sizes.get(Axis::K).map(|k| k as u128);
            let most = slots.map(|k| k * u128::from(self.index.tokens));
            if most.is_some_and(|most| pairs > most) {
                let reason = format!("expected at most {most:?} (tokens × top-k), found {pairs}");
                return Err(contradiction(reason));
            }
            Ok(counts)
        })
    }

    fn count(&self, count: i64) -> Result<u64> {
        // An expert is chosen at most once by a token.
        let fits = u64::try_from(count).ok().filter(|&c| c <= self.index.tokens);
        let expected = format!("0..={}", self.index.tokens);
        fits.ok_or_else(|| contradiction(format!("count: expected {expected}, found {count}")))
    }

    fn visits(&self) -> Result<Vec<u64>> {
        let mut visits = vec![0; self.experts()];
        self.rows(
            "topk_indices",
            |t, r| t.integers(r),
            |_, chosen| {
                for expert in chosen {
                    match usize::try_from(expert).ok().and_then(|e| visits.get_mut(e)) {
                        Some(count) => *count += 1,
                        None if expert == -1 => {}
                        None => {
                            let n = visits.len();
                            let reason = format!("expert: expected −1..{n}, found {expert}");
                            return Err(contradiction(reason));
                        }
                    }
                }
                Ok(())
            },
        )?;
        Ok(visits)
    }

    /// `Zᵀ Z`, given or streamed from the logits, accumulated in `f64`.
    fn logit_gram(&self) -> Result<Array2<f64>> {
        let n = self.experts();
        if self.find("logit_gram").is_some() {
            return self.with("logit_gram", |tensor| matrix(n, n, tensor.wide()?));
        }
        let mut gram = Array2::zeros((n, n));
        self.rows(
            "router_logits",
            |t, r| t.floats(r),
            |_, logits| {
                let logits = matrix(logits.len() / n, n, logits)?;
                Cpu::new().add_gram(logits.view(), &mut gram)
            },
        )?;
        Ok(gram)
    }

    /// Sum of the applied weights: given, or from each token's choice, or mean × count.
    fn router_mass(&self, counts: &[u64]) -> Result<Vec<f64>> {
        if self.find("router_mass").is_some() {
            return self.wide("router_mass");
        }
        let per_token = ["topk_indices", "topk_weights"].map(|part| self.find(part).is_some());
        if self.index.sampled || per_token != [true, true] {
            let mean = self.wide("expert_mean_gate")?;
            return Ok(mean.iter().zip(counts).map(|(m, &c)| m * c as f64).collect());
        }
        let k = self.index.sizes.get(Axis::K).unwrap_or(0);
        let mut mass = vec![0.0; self.experts()];
        self.rows(
            "topk_weights",
            |t, r| t.floats(r),
            |first, weights| {
                let range = first * k..first * k + weights.len();
                let chosen = self.with("topk_indices", |tensor| tensor.integers(range))?;
                for (expert, weight) in chosen.into_iter().zip(weights) {
                    // Indices were checked with the counts; −1 was dropped.
                    if let Some(sum) = usize::try_from(expert).ok().and_then(|e| mass.get_mut(e)) {
                        *sum += f64::from(weight);
                    }
                }
                Ok(())
            },
        )?;
        Ok(mass)
    }

    /// Per-token observations of the tokens that no capacity limit touched: a choice that was
    /// dropped has no expert, so such a token counts in the Gram matrix and, for its other slots,
    /// in the counts, but is no sample.
    fn samples(&self) -> Result<Samples> {
        let chosen = self.with("topk_indices", |tensor| {
            matrix(tensor.shape[0], tensor.shape[1], tensor.integers(0..tensor.len())?)
        })?;
        let whole = |(t, row): (usize, ndarray::ArrayView1<'_, i64>)| {
            row.iter().all(|&e| e >= 0).then_some(t)
        };
        let kept: Vec<usize> = chosen.rows().into_iter().enumerate().filter_map(whole).collect();
        let keep = |array: Array2<f32>| match kept.len() == chosen.nrows() {
            true => array,
            false => array.select(Dim(0), &kept),
        };
        let experts = chosen.select(Dim(0), &kept).mapv(|e| e as u32);
        let routed = self.find("routed_output").map(|_| self.matrix("routed_output"));
        Ok(Samples {
            inputs: keep(self.matrix("moe_input")?),
            logits: keep(self.matrix("router_logits")?),
            routing: Routing { experts, weights: keep(self.matrix("topk_weights")?) },
            routed_output: routed.transpose()?.map(keep),
        })
    }

    fn fisher(&self) -> Result<ExpertTensors> {
        let fisher = self.expert_tensors("fisher")?;
        for (e, expert) in fisher.iter().enumerate() {
            for (role, linear) in expert.view().linears() {
                if let Some(x) = linear.weight.iter().find(|&&x| x < 0.0) {
                    let part = self.name(&format!("fisher.{role}"));
                    let reason = format!("Fisher information: expected 0 or more, found {x}");
                    return Err(contradiction(reason)).in_tensor(&part).in_expert(e);
                }
            }
        }
        Ok(fisher)
    }

    /// Tensors shaped like the experts. They have no activation of their own: gated ones are
    /// labelled SiLU, others ReLU.
    fn expert_tensors(&self, kind: &str) -> Result<ExpertTensors> {
        let role = |role: &str| format!("{kind}.{role}");
        let gated = self.find(&role("gate")).is_some();
        let activation = if gated { Activation::Silu } else { Activation::Relu };
        let slice = |role: &str, e: usize| -> Result<Linear> {
            self.with(role, |t| {
                let (rows, cols) = (t.shape[1], t.shape[2]);
                let size = rows * cols;
                Ok(Linear::new(matrix(rows, cols, t.floats(e * size..(e + 1) * size)?)?))
            })
        };
        let expert = |e: usize| {
            let gate = gated.then(|| slice(&role("gate"), e)).transpose()?;
            Expert::new(gate, slice(&role("up"), e)?, slice(&role("down"), e)?, activation)
        };
        (0..self.experts()).map(|e| expert(e).in_expert(e)).collect()
    }
}

fn matrix<T>(rows: usize, cols: usize, values: Vec<T>) -> Result<Array2<T>> {
    let found = values.len();
    Array2::from_shape_vec((rows, cols), values).map_err(|_| -> Error {
        ErrorKind::Shape {
            operation: "statistics tensor",
            expected: format!("{:?}", (rows, cols)),
            found: found.to_string(),
        }
        .into()
    })
}
