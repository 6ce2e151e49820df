//! Routing statistics of a layer, observed while text ran through the model.

use ndarray::{Array2, ArrayView2};

use super::check::{Finite, check_finite_f64};
use super::expert::Expert;
use super::router::Routing;
use crate::error::{Error, ErrorKind, Result};

/// Per-token observations of one layer: `t` tokens, `n` experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// `(t, d_model)` inputs of the MoE block, after the layer norm.
    pub inputs: Array2<f32>,
    /// `(t, n)` router logits, before softmax or sigmoid, without correction bias.
    pub logits: Array2<f32>,
    /// Chosen experts and applied weights.
    pub routing: Routing,
    /// `(t, d_model)` outputs of the routed experts (shared experts excluded), if observed.
    pub routed_output: Option<Array2<f32>>,
}

impl Samples {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.inputs.nrows()
    }

    /// Tokens routed to any of `experts`, ascending, each once.
    pub fn tokens_of(&self, experts: &[usize]) -> Vec<usize> {
        let visits = |chosen: ndarray::ArrayView1<'_, u32>| {
            chosen.iter().any(|&e| experts.contains(&(e as usize)))
        };
        let rows = self.routing.experts.rows().into_iter().enumerate();
        rows.filter(|(_, chosen)| visits(*chosen)).map(|(t, _)| t).collect()
    }

    /// Inputs of the tokens routed to any of `experts`: `(t', d_model)`.
    pub fn inputs_of(&self, experts: &[usize]) -> Array2<f32> {
        self.inputs.select(ndarray::Axis(0), &self.tokens_of(experts))
    }
}

/// Tensors shaped like the experts of a layer: gradients, or a diagonal Fisher information.
pub type ExpertTensors = Vec<Expert>;

/// Routing statistics of one layer with `n` experts. Counts are always present; every other part
/// is there when the source provided it and a stage asked for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RoutingStats {
    /// Number of observed tokens; masked tokens are not counted.
    pub tokens: u64,
    /// `(n)` routed (token, slot) pairs per expert. Capacity-dropped tokens count for none.
    pub counts: Vec<u64>,
    /// `(n, n)` Gram matrix `Zᵀ Z` of the router logits.
    pub logit_gram: Option<Array2<f64>>,
    /// `(n)` sum of the applied weights over the tokens routed to each expert.
    pub router_mass: Option<Vec<f64>>,
    /// `(n)` mean L2 norm of the unweighted expert output over its tokens (EAN); 0 if none.
    pub output_norm: Option<Vec<f64>>,
    /// `(n)` mean of applied weight × output norm over its tokens (REAP); 0 if none.
    pub reap: Option<Vec<f64>>,
    /// `(n, d_model)` mean unweighted output over its tokens; 0 if none.
    pub mean_output: Option<Array2<f32>>,
    /// Per-token observations.
    pub samples: Option<Samples>,
    /// Gradients of the task loss with respect to the experts' weights.
    pub gradients: Option<ExpertTensors>,
    /// Diagonal Fisher information of the experts' weights.
    pub fisher: Option<ExpertTensors>,
}

impl RoutingStats {
    /// Counts only: what usage-based grouping and merging need.
    pub fn from_counts(counts: Vec<u64>, tokens: u64) -> Self {
        Self { tokens, counts, ..Self::default() }
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.counts.len()
    }

    /// Activation frequency `u_i = c_i / Σ_j c_j`: sums to 1 over the layer. Uniform when nothing
    /// was counted.
    pub fn usage(&self) -> Vec<f64> {
        let total: u64 = self.counts.iter().sum();
        let n = self.counts.len() as f64;
        let share = |&c: &u64| if total == 0 { 1.0 / n } else { c as f64 / total as f64 };
        self.counts.iter().map(share).collect()
    }

    /// `(n)` mean applied weight over each expert's tokens, 0 if none: router mass by count.
    pub fn mean_gate(&self) -> Option<Vec<f64>> {
        let mean = |(&mass, &count): (&f64, &u64)| {
            if count == 0 { 0.0 } else { mass / count as f64 }
        };
        let mass = self.router_mass.as_ref()?;
        Some(mass.iter().zip(&self.counts).map(mean).collect())
    }

    /// The samples, or an error that names who needs them.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`].
    pub fn need_samples(&self, stage: &str) -> Result<&Samples> {
        self.samples.as_ref().ok_or_else(|| missing(stage, "per-token inputs and routing"))
    }

    /// A per-expert vector, or an error that names who needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`].
    pub fn need<'a, T>(part: &'a Option<T>, stage: &str, what: &str) -> Result<&'a T> {
        part.as_ref().ok_or_else(|| missing(stage, what))
    }

    /// Checks every part against a layer of `n` experts of width `d_model`.
    ///
    /// # Errors
    /// [`ErrorKind::Statistics`] for a wrong size or an impossible value,
    /// [`ErrorKind::NotFinite`] for NaN or infinity.
    pub fn validate(&self, n: usize, d_model: usize) -> Result<()> {
        let misfit = |what: &str, expected: String, found: String| -> Error {
            let reason = format!("{what}: expected {expected}, found {found}");
            ErrorKind::Statistics { reason }.into()
        };
        if self.counts.len() != n {
            return Err(misfit("counts", n.to_string(), self.counts.len().to_string()));
        }
        let vectors = [
            (&self.router_mass, "router mass"),
            (&self.output_norm, "expert output norm"),
            (&self.reap, "REAP saliency"),
        ];
        for (vector, what) in vectors {
            let Some(vector) = vector else { continue };
            if vector.len() != n {
                return Err(misfit(what, n.to_string(), vector.len().to_string()));
            }
            vector.check_finite(what)?;
            if let Some(x) = vector.iter().find(|&&x| x < 0.0) {
                return Err(misfit(what, "0 or more".into(), x.to_string()));
            }
        }
        if let Some(gram) = &self.logit_gram {
            expect("router-logit Gram", (n, n), gram.dim())?;
            check_finite_f64("logit Gram", gram)?;
        }
        if let Some(mean) = &self.mean_output {
            expect("mean expert output", (n, d_model), mean.dim())?;
            mean.check_finite("mean expert output")?;
        }
        match &self.samples {
            Some(samples) => check_samples(samples, n, d_model),
            None => Ok(()),
        }
    }
}

fn missing(stage: &str, needs: &str) -> Error {
    let remedy = "collect them in the statistics file, or choose another stage".into();
    ErrorKind::Missing { stage: stage.into(), needs: needs.into(), remedy }.into()
}

fn expect(what: &str, expected: (usize, usize), found: (usize, usize)) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let reason = format!("{what}: expected {expected:?}, found {found:?}");
    Err(ErrorKind::Statistics { reason }.into())
}

fn check_samples(samples: &Samples, n: usize, d_model: usize) -> Result<()> {
    let t = samples.tokens();
    let Samples { inputs, logits, routing, routed_output } = samples;
    let k = routing.experts.ncols();
    expect("layer inputs", (t, d_model), inputs.dim())?;
    expect("router logits", (t, n), logits.dim())?;
    expect("chosen experts", (t, k), routing.experts.dim())?;
    expect("applied weights", (t, k), routing.weights.dim())?;
    let finite = |what, a: ArrayView2<'_, f32>| a.check_finite(what);
    finite("layer inputs", inputs.view())?;
    finite("router logits", logits.view())?;
    finite("applied weights", routing.weights.view())?;
    if let Some(output) = routed_output {
        expect("routed output", (t, d_model), output.dim())?;
        finite("routed output", output.view())?;
    }
    match routing.experts.iter().find(|&&e| e as usize >= n) {
        None => Ok(()),
        Some(e) => {
            let reason = format!("a token was routed to expert {e} of {n}");
            Err(ErrorKind::Statistics { reason }.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_sums_to_one_and_is_uniform_when_nothing_was_seen() {
        assert_eq!(RoutingStats::from_counts(vec![1, 3], 4).usage(), [0.25, 0.75]);
        assert_eq!(RoutingStats::from_counts(vec![0, 0], 0).usage(), [0.5, 0.5]);
    }

    #[test]
    fn statistics_of_another_model_are_refused() {
        let stats = RoutingStats::from_counts(vec![1, 2, 3], 6);
        assert!(stats.validate(3, 8).is_ok());
        assert!(stats.validate(4, 8).unwrap_err().to_string().contains("expected 4, found 3"));
        let reap = Some(vec![0.0, f64::NAN, 1.0]);
        assert!(RoutingStats { reap, ..stats.clone() }.validate(3, 8).is_err());
        let mean_output = Some(Array2::zeros((3, 7)));
        assert!(RoutingStats { mean_output, ..stats }.validate(3, 8).is_err());
    }
}
