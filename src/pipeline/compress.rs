//! Compression of a merged layer: every matrix of every merged expert in factors `L R + S`, and
//! multiplied out again, so that every export holds the function of the factors; a native one holds
//! the factors themselves.

use ndarray::{Array2, ArrayView2, Axis};

use super::compressor::{Compressor, Ranks};
use super::report::{self, Change, CompressionReport, Kind, StableRanks};
use crate::decompose::analysis::{mean_change, stable_rank};
use crate::error::{Error, Locate, Result};
use crate::model::{
    Expert, ExpertTensors, Factored, Grouping, MergedLayer, MoeLayer, Role, RoutingStats,
};
use crate::par;
use crate::stage::{Context, Kept, Moments, RankBudget};

/// A matrix as it will be, and what is told of it.
struct Done {
    /// Multiplied out; `None` for one that stays.
    weight: Option<Array2<f32>>,
    factored: Option<Factored>,
    ranks: Ranked,
}

/// What the report needs of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranked {
    /// Numbers before.
    pub(super) dense: usize,
    /// Numbers stored.
    pub(super) parameters: usize,
    /// Stable rank before.
    pub(super) merged: f64,
    /// Stable rank after.
    pub(super) compressed: f64,
}

/// What a compression of a layer can go by.
#[derive(Clone, Copy, Default)]
pub(super) struct Given<'a> {
    /// Of the layer's tokens.
    pub(super) inputs: Option<ArrayView2<'a, f32>>,
    /// Of the loss by the merged experts' weights.
    pub(super) gradients: Option<&'a ExpertTensors>,
    /// Whether the narrowed router chooses.
    pub(super) narrowed: bool,
    /// Under a size budget.
    pub(super) ranks: Option<&'a Ranks>,
}

/// The tokens that go to a layer's experts; none where no method asks for them.
pub(super) struct Tokens<'a> {
    pub(super) inputs: Option<ArrayView2<'a, f32>>,
    visited: Vec<Vec<(usize, f32)>>,
}

impl Tokens<'_> {
    /// Second moments of what goes into a matrix of expert `e`.
    pub(super) fn moments(
        &self,
        e: usize,
        expert: &Expert,
        role: Role,
        cx: &Context,
    ) -> Result<Option<Moments>> {
        let Some(x) = self.inputs else { return Ok(None) };
        moments(expert, role, x, &self.visited[e], cx).map(Some)
    }
}

impl Compressor {
    /// Stable ranks before merging: for every group and role the mean over the group's members.
    pub(super) fn original(
        &self,
        layer: &MoeLayer,
        grouping: &Grouping,
        cx: &Context,
    ) -> Result<Vec<f64>> {
        let jobs = matrices(layer.experts());
        let inner = cx.per_task();
        let ranks = par::map(jobs.len(), |i| {
            let (e, role) = jobs[i];
            let linear = layer.experts()[e].view().linear(role);
            linear.map_or(Ok(0.0), |l| stable_rank(l.weight, &inner)).in_expert(e)
        })?;
        let roles = jobs.len() / layer.experts().len();
        let mean = |g: usize, role: usize| {
            let members = grouping.members(g);
            let sum: f64 = members.iter().map(|&e| ranks[e * roles + role]).sum();
            sum / members.len() as f64
        };
        let groups = 0..grouping.groups();
        Ok(groups
            .flat_map(|g| (0..roles).map(move |role| (g, role)))
            .map(|(g, role)| mean(g, role))
            .collect())
    }

    /// The layer with every matrix replaced by its `L R + S`, or its experts by what else the
    /// method makes of them, experts that stayed alone included; biases and routers are kept.
    /// `original` is [`Compressor::original`] of the layer before.
    ///
    /// Methods that weigh errors by second moments get those of the tokens among `inputs` that
    /// visit the expert: the inputs themselves for gate and up, the merged expert's hidden
    /// activations for down. An expert that none of them visits gets those of all.
    ///
    /// # Memory
    /// The result and its factors beside the layer; with moments `8 n²` bytes and the hidden
    /// activations of an expert's tokens for every thread.
    pub(super) fn compress(
        &self,
        layer: MergedLayer,
        original: &[f64],
        given: Given<'_>,
        cx: &Context,
    ) -> Result<(MergedLayer, CompressionReport)> {
        let Given { inputs, gradients, narrowed, ranks } = given;
        let inputs = inputs.filter(|x| self.uses_moments() && x.nrows() > 0);
        let visited = match inputs {
            None => Vec::new(),
            Some(x) => layer.visits(narrowed, x, cx.compute())?,
        };
        let tokens = Tokens { inputs, visited };
        match self {
            Self::Each { decomposer, .. } => {
                let of = |e: usize,
                          role: Role,
                          weight: ArrayView2<'_, f32>,
                          budget: &RankBudget,
                          cx: &Context| {
                    let moments = tokens.moments(e, &layer.experts[e], role, cx)?;
                    decomposer.decompose(weight, moments.as_ref(), budget, cx)
                };
                let (done, ranks) = self.each(&layer, ranks, &of, cx)?;
                replace(layer, original, done, ranks)
            }
            Self::Sensitive { method, .. } => {
                let gradients = RoutingStats::need(&gradients, self.name(), "gradients")?;
                let of = |e: usize,
                          role: Role,
                          weight: ArrayView2<'_, f32>,
                          budget: &RankBudget,
                          cx: &Context| {
                    let gradient = gradients.get(e).and_then(|g| g.view().linear(role));
                    let gradient = gradient.map(|g| g.weight).filter(|g| g.dim() == weight.dim());
                    let missing = || Error::shape("gradients", weight.dim(), "others");
                    method.by_sensitivity(weight, gradient.ok_or_else(missing)?, budget, cx)
                };
                let (done, ranks) = self.each(&layer, ranks, &of, cx)?;
                replace(layer, original, done, ranks)
            }
            Self::Neurons(neurons) => neurons.compress(layer, original, &tokens, cx),
            Self::Shared(shared) => shared.compress(layer, original, &tokens, cx),
        }
    }

    fn each(
        &self,
        layer: &MergedLayer,
        ranks: Option<&Ranks>,
        of: &Decompose<'_>,
        cx: &Context,
    ) -> Result<(Vec<Done>, usize)> {
        let (view, groups) = (layer.experts[0].view(), layer.experts.len());
        let (gated, dim) = (view.gate.is_some(), view.up.weight.dim());
        let planned = self.factoring(layer.id, groups, gated, dim, ranks)?;
        let jobs = matrices(&layer.experts);
        let roles = jobs.len() / groups;
        let inner = cx.per_task();
        let done = par::map(jobs.len(), |i| {
            let (e, role) = jobs[i];
            let view = layer.experts[e].view();
            let weight = view.linear(role).unwrap_or(view.up).weight;
            let kept = planned.as_ref().and_then(|p| p.experts().get(e)?.get(i % roles)).copied();
            let of_one = || match kept {
                Some(Kept::Factors { budget, .. }) => {
                    factored(weight, of(e, role, weight, &budget, &inner)?, &inner)
                }
                _ => stays(weight, &inner),
            };
            of_one().in_expert(e)
        })?;
        Ok((done, roles))
    }
}

/// How matrix `role` of expert `e` is decomposed.
type Decompose<'a> =
    dyn Fn(usize, Role, ArrayView2<'_, f32>, &RankBudget, &Context) -> Result<Factored> + Sync + 'a;

/// The layer with `roles` matrices an expert replaced.
fn replace(
    mut layer: MergedLayer,
    original: &[f64],
    done: Vec<Done>,
    roles: usize,
) -> Result<(MergedLayer, CompressionReport)> {
    let told: Vec<Ranked> = done.iter().map(|d| d.ranks).collect();
    let report = describe(&layer, original, &told);
    let (weights, factors): (Vec<_>, Vec<_>) =
        done.into_iter().map(|d| (d.weight, d.factored)).unzip();
    let mut factors = factors.into_iter();
    let of_one = |_: &Expert| factors.by_ref().take(roles).collect();
    layer.factors = Some(layer.experts.iter().map(of_one).collect());
    layer.experts = with_all_weights(std::mem::take(&mut layer.experts), weights)?;
    Ok((layer, report))
}

/// Experts with their matrices replaced, in the order of [`matrices`], where there are any.
pub(super) fn with_all_weights(
    experts: Vec<Expert>,
    weights: Vec<Option<Array2<f32>>>,
) -> Result<Vec<Expert>> {
    let mut weights = weights.into_iter();
    experts.into_iter().map(|expert| with_weights(expert, &mut weights)).collect()
}

fn factored(weight: ArrayView2<'_, f32>, factored: Factored, cx: &Context) -> Result<Done> {
    let product = factored.to_dense(cx.compute())?;
    let (dense, parameters) = (weight.len(), factored.parameters());
    let (merged, compressed) = (stable_rank(weight, cx)?, stable_rank(product.view(), cx)?);
    let ranks = Ranked { dense, parameters, merged, compressed };
    Ok(Done { weight: Some(product), factored: Some(factored), ranks })
}

/// A matrix that stays dense.
fn stays(weight: ArrayView2<'_, f32>, cx: &Context) -> Result<Done> {
    let (rank, dense) = (stable_rank(weight, cx)?, weight.len());
    let ranks = Ranked { dense, parameters: dense, merged: rank, compressed: rank };
    Ok(Done { weight: None, factored: None, ranks })
}

/// Every matrix of some experts, expert by expert.
pub(super) fn matrices(experts: &[Expert]) -> Vec<(usize, Role)> {
    let roles = |(e, expert): (usize, &Expert)| {
        expert.view().linears().map(|(role, _)| (e, role)).collect::<Vec<_>>()
    };
    experts.iter().enumerate().flat_map(roles).collect()
}

/// The inputs of the tokens that visit an expert; of all where none does.
pub(super) fn visiting(inputs: ArrayView2<'_, f32>, visits: &[(usize, f32)]) -> Array2<f32> {
    if visits.is_empty() {
        return inputs.to_owned();
    }
    let tokens: Vec<usize> = visits.iter().map(|(token, _)| *token).collect();
    inputs.select(Axis(0), &tokens)
}

/// Of what goes into a matrix.
pub(super) fn moments(
    expert: &Expert,
    role: Role,
    inputs: ArrayView2<'_, f32>,
    visits: &[(usize, f32)],
    cx: &Context,
) -> Result<Moments> {
    let x = visiting(inputs, visits);
    match role {
        Role::Gate | Role::Up => Moments::of(x.view(), cx.compute()),
        Role::Down => {
            let hidden = expert.view().hidden(x.view(), cx.compute())?;
            Moments::of(hidden.view(), cx.compute())
        }
    }
}

/// The expert with its matrices replaced by the next ones of `weights`, where there are any.
pub(super) fn with_weights(
    expert: Expert,
    weights: &mut dyn Iterator<Item = Option<Array2<f32>>>,
) -> Result<Expert> {
    let activation = expert.view().activation;
    let (mut gate, mut up, mut down) = expert.into_parts();
    for (linear, weight) in gate.iter_mut().chain([&mut up, &mut down]).zip(weights) {
        if let Some(weight) = weight {
            linear.weight = weight;
        }
    }
    Expert::new(gate, up, down, activation)
}

/// The report on a layer whose matrices became `done`; `layer` is it before.
pub(super) fn describe(
    layer: &MergedLayer,
    original: &[f64],
    done: &[Ranked],
) -> CompressionReport {
    let experts = layer.experts.len() as u64;
    let kind = Kind::of(&layer.experts[0]);
    let dense = experts * kind.parameters;
    let matrices: u64 = done.iter().map(|d| d.dense as u64).sum();
    let factors: u64 = done.iter().map(|d| d.parameters as u64).sum();
    // What is no matrix, biases, is kept as it is.
    let parameters = Change { before: dense, after: dense - matrices + factors };
    let router = layer.narrowed.as_ref().unwrap_or(&layer.router);
    let flops = |parameters: u64| {
        let kind = Kind { parameters: parameters / experts, ..kind };
        report::flops_per_token(kind, router.rule(), router.experts())
    };
    let merged: Vec<f64> = done.iter().map(|d| d.merged).collect();
    let compressed: Vec<f64> = done.iter().map(|d| d.compressed).collect();
    let mean = |ranks: &[f64]| ranks.iter().sum::<f64>() / ranks.len().max(1) as f64;
    CompressionReport {
        parameters,
        flops_per_token: Change {
            before: flops(parameters.before),
            after: flops(parameters.after),
        },
        stable_rank: StableRanks {
            original: mean(original),
            merged: mean(&merged),
            compressed: mean(&compressed),
            merging: mean_change(original, &merged),
            compressing: mean_change(&merged, &compressed),
        },
    }
}
