//! Compression of a merged layer: every matrix of every merged expert in factors `L R + S`, and
//! multiplied out again, so that every export holds the function of the factors; a native one holds
//! the factors themselves.

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayView2, Axis};

use super::report::{self, Change, CompressionReport, Kind, StableRanks};
use super::size::SizeBudget;
use crate::checkpoint::Factoring;
use crate::decompose::analysis::{mean_change, stable_rank};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Factored, Grouping, LayerId, MergedLayer, MoeLayer, Role, Structure};
use crate::par;
use crate::stage::{Context, Decomposer, Kept, Moments, Needs, RankBudget, Stage};

/// What is kept of every matrix `(m, n)` of every merged expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixBudget {
    /// Rank of the low-rank part; 0 for none.
    pub rank: usize,
    /// Share of the `m` rows that stay dense, in (0, 1], rounded up to whole rows; `None` for none.
    /// Of the `n` columns where the structure says so.
    pub rows: Option<f64>,
    /// Whether rows or columns stay dense; that of the decomposer.
    pub structure: Structure,
}

impl MatrixBudget {
    /// Rank and number of rows for one matrix.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a share outside (0, 1], a rank
    /// above `min(m, n)`, or neither.
    pub fn of(&self, dim: (usize, usize)) -> Result<RankBudget> {
        let lines = self.structure.lines(dim);
        let mut budget = RankBudget::rank(self.rank);
        if let Some(share) = self.rows {
            budget = budget.with_share(lines, share)?;
        }
        budget.check(dim, lines)?;
        Ok(budget)
    }
}

/// What compression may keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CompressionBudget {
    /// The same of every matrix.
    Matrix(MatrixBudget),
    /// As much of each matrix as pays most for all of them together.
    Size(SizeBudget),
}

impl From<MatrixBudget> for CompressionBudget {
    fn from(budget: MatrixBudget) -> Self {
        Self::Matrix(budget)
    }
}

impl From<SizeBudget> for CompressionBudget {
    fn from(budget: SizeBudget) -> Self {
        Self::Size(budget)
    }
}

/// A decomposer and what it may keep.
#[derive(Debug)]
pub(super) struct Compressor {
    pub(super) decomposer: Box<dyn Decomposer>,
    pub(super) budget: CompressionBudget,
}

/// What a size budget leaves of every matrix, layer by layer.
pub(super) type Ranks = BTreeMap<LayerId, Factoring>;

/// A matrix as it will be, and what is told of it.
struct Done {
    /// Multiplied out; `None` for one that stays.
    weight: Option<Array2<f32>>,
    factored: Option<Factored>,
    dense: usize,
    merged: f64,
    compressed: f64,
}

impl Done {
    fn parameters(&self) -> u64 {
        self.factored.as_ref().map_or(self.dense, Factored::parameters) as u64
    }
}

impl Compressor {
    /// Fails when a layer's matrices cannot be kept to the budget; reads no weight.
    pub(super) fn check(&self, (d_ff, d_model): (usize, usize)) -> Result<()> {
        match self.budget {
            CompressionBudget::Matrix(budget) => {
                budget.of((d_ff, d_model))?;
                budget.of((d_model, d_ff)).map(drop)
            }
            CompressionBudget::Size(budget) => budget.check(),
        }
    }

    /// What is stored of the matrices of `groups` merged experts, `gated` or not; `ranks` are those
    /// of a size budget.
    pub(super) fn factoring(
        &self,
        id: LayerId,
        groups: usize,
        gated: bool,
        (d_ff, d_model): (usize, usize),
        ranks: Option<&Ranks>,
    ) -> Result<Factoring> {
        match self.budget {
            CompressionBudget::Matrix(budget) => {
                let structure = budget.structure;
                let of = |dim| Ok::<_, Error>(Kept::Factors { budget: budget.of(dim)?, structure });
                let hidden = of((d_ff, d_model))?;
                let mut expert = vec![hidden; 1 + usize::from(gated)];
                expert.push(of((d_model, d_ff))?);
                Ok(Factoring::new(vec![expert; groups]))
            }
            CompressionBudget::Size(_) => {
                let planned = ranks.and_then(|ranks| ranks.get(&id)).cloned();
                planned.ok_or_else(|| Error::range("layer", "one with planned ranks", id))
            }
        }
    }

    pub(super) fn needs(&self) -> Needs {
        self.decomposer.needs()
    }

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

    /// The layer with every matrix replaced by its `L R + S`, experts that stayed alone included;
    /// biases and routers are kept. `original` is [`Compressor::original`] of the layer before.
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
        mut layer: MergedLayer,
        original: &[f64],
        inputs: Option<ArrayView2<'_, f32>>,
        narrowed: bool,
        ranks: Option<&Ranks>,
        cx: &Context,
    ) -> Result<(MergedLayer, CompressionReport)> {
        let inputs = inputs.filter(|x| self.decomposer.uses_moments() && x.nrows() > 0);
        let visited = match inputs {
            None => Vec::new(),
            Some(x) => layer.visits(narrowed, x, cx.compute())?,
        };
        let (view, groups) = (layer.experts[0].view(), layer.experts.len());
        let (gated, dim) = (view.gate.is_some(), view.up.weight.dim());
        let kept = self.factoring(layer.id, groups, gated, dim, ranks)?;
        let jobs = matrices(&layer.experts);
        let roles = jobs.len() / groups;
        let inner = cx.per_task();
        let done = par::map(jobs.len(), |i| {
            let (e, role) = jobs[i];
            let expert = &layer.experts[e];
            let kept = kept.experts().get(e).and_then(|all| all.get(i % roles)).copied();
            let Some(Kept::Factors { budget, .. }) = kept else {
                return stays(expert, role, &inner).in_expert(e);
            };
            let moments = match inputs {
                None => None,
                Some(x) => Some(moments(expert, role, x, &visited[e], &inner).in_expert(e)?),
            };
            self.one(expert, role, moments.as_ref(), &budget, &inner).in_expert(e)
        })?;
        let report = describe(&layer, original, &done);
        let (weights, factors): (Vec<_>, Vec<_>) =
            done.into_iter().map(|d| (d.weight, d.factored)).unzip();
        let mut factors = factors.into_iter();
        let of_one = |_: &Expert| factors.by_ref().take(roles).collect();
        layer.factors = Some(layer.experts.iter().map(of_one).collect());
        let mut weights = weights.into_iter();
        let experts = std::mem::take(&mut layer.experts);
        layer.experts = experts
            .into_iter()
            .map(|expert| with_weights(expert, &mut weights))
            .collect::<Result<_>>()?;
        Ok((layer, report))
    }

    fn one(
        &self,
        expert: &Expert,
        role: Role,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Done> {
        let view = expert.view();
        let weight = view.linear(role).unwrap_or(view.up).weight;
        let factored = self.decomposer.decompose(weight, moments, budget, cx)?;
        let product = factored.to_dense(cx.compute())?;
        let merged = stable_rank(weight, cx)?;
        let compressed = stable_rank(product.view(), cx)?;
        let (dense, factored) = (weight.len(), Some(factored));
        Ok(Done { weight: Some(product), factored, dense, merged, compressed })
    }
}

/// A matrix that stays dense.
fn stays(expert: &Expert, role: Role, cx: &Context) -> Result<Done> {
    let view = expert.view();
    let weight = view.linear(role).unwrap_or(view.up).weight;
    let rank = stable_rank(weight, cx)?;
    let dense = weight.len();
    Ok(Done { weight: None, factored: None, dense, merged: rank, compressed: rank })
}

/// Every matrix of some experts, expert by expert.
pub(super) fn matrices(experts: &[Expert]) -> Vec<(usize, Role)> {
    let roles = |(e, expert): (usize, &Expert)| {
        expert.view().linears().map(|(role, _)| (e, role)).collect::<Vec<_>>()
    };
    experts.iter().enumerate().flat_map(roles).collect()
}

/// Of what goes into a matrix.
pub(super) fn moments(
    expert: &Expert,
    role: Role,
    inputs: ArrayView2<'_, f32>,
    visits: &[(usize, f32)],
    cx: &Context,
) -> Result<Moments> {
    let tokens: Vec<usize> = match visits {
        [] => (0..inputs.nrows()).collect(),
        visits => visits.iter().map(|(token, _)| *token).collect(),
    };
    let x = inputs.select(Axis(0), &tokens);
    match role {
        Role::Gate | Role::Up => Moments::of(x.view(), cx.compute()),
        Role::Down => {
            let hidden = expert.view().hidden(x.view(), cx.compute())?;
            Moments::of(hidden.view(), cx.compute())
        }
    }
}

/// The expert with its matrices replaced by the next ones of `weights`, where there are any.
fn with_weights(
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

fn describe(layer: &MergedLayer, original: &[f64], done: &[Done]) -> CompressionReport {
    let experts = layer.experts.len() as u64;
    let kind = Kind::of(&layer.experts[0]);
    let dense = experts * kind.parameters;
    let matrices: u64 = done.iter().map(|d| d.dense as u64).sum();
    let factors: u64 = done.iter().map(Done::parameters).sum();
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
