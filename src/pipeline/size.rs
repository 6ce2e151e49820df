//! A target size, and the ranks that meet it.
//!
//! The spectra of all merged matrices have to be known before one of them is decomposed, so that a
//! size budget costs a pass of its own: every layer is merged as in the second pass, looked at, and
//! dropped. Recoverers do not run in it: they move weights little and cost the most.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::builder::Pipeline;
use super::compressor::{Compressor, Ranks};
use super::engine::{self, Source};
use super::matrix_budget::CompressionBudget;
use super::observe::{Observer, Phase};
use super::passes::Decided;
use super::policy::Plan;
use super::spectra::spectra;
use crate::checkpoint::{Checkpoint, Factoring, WritePlan};
use crate::decompose::ranks::{Allocation, Spectrum, allocate};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Expert, LayerId, MoeLayer, Structure};
use crate::stage::{Kept, RankBudget};

/// How large.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    /// Bytes of tensors.
    Bytes(u64),
    /// Percent of what it is in the source, above 0 and at most 100.
    Percent(f64),
}

/// Of what a size is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Portion {
    /// The routed experts of all MoE layers, protected ones included.
    #[default]
    Experts,
    /// All tensors of the model.
    Model,
}

/// A target size of a native folder. The ranks of all matrices are chosen so that it is met from
/// below, to less than what one more rank takes: within 1 % unless the model is tiny, or whole when
/// the merged experts fit without compression.
///
/// The next rank goes to the matrix of expert `e` where `w σ_{r+1}² / (m + n)` is largest. With
/// samples `σ` are the singular values of `W S`, whose tail is the mean squared error of the
/// matrix's own output, and `w = Σ g² · s`: the squared router weights of the tokens that visit the
/// expert, and how much of an error reaches the layer's output, to first order; `s` is 1 for down,
/// and for gate and up the mean over hidden units `a` of `‖W_down[:, a]‖² · E[(∂h_a/∂z_a)²]`.
/// Without samples `σ` are those of `W` and `w = usage / ‖W‖²`: relative errors count alike. A
/// matrix whose next rank would not pay for itself stays dense.
///
/// Source: ours; the greedy choice is [`allocate`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SizeBudget {
    /// How large.
    pub size: Size,
    /// Of what.
    #[serde(default)]
    pub of: Portion,
    /// The least rank of any matrix.
    #[serde(default = "one")]
    pub least_rank: usize,
}

fn one() -> usize {
    1
}

impl SizeBudget {
    /// A share of the source's expert bytes.
    pub fn percent(percent: f64) -> Self {
        Self { size: Size::Percent(percent), of: Portion::Experts, least_rank: 1 }
    }

    /// Refuses sizes that are none.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for 0 bytes, a share outside (0, 100], or a least rank of 0.
    pub fn check(&self) -> Result<()> {
        match self.size {
            Size::Bytes(0) => {
                return Err(Error::range("size of a compression", "1 byte or more", 0));
            }
            Size::Percent(p) if !(p > 0.0 && p <= 100.0) => {
                return Err(Error::range("percent of a size", "a number in (0, 100]", p));
            }
            _ => {}
        }
        match self.least_rank {
            0 => Err(Error::range("least rank", "1 or more", 0)),
            _ => Ok(()),
        }
    }

    /// The target in bytes, of which `whole` is the size in the source.
    fn bytes(&self, whole: u64) -> u64 {
        match self.size {
            Size::Bytes(bytes) => bytes,
            Size::Percent(percent) => (percent / 100.0 * whole as f64) as u64,
        }
    }
}

/// What a budget has to spend, and what is spent already.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Room {
    /// Bytes of the target, or of its experts.
    target: u64,
    /// Of these, what no rank changes: other tensors, protected layers, biases.
    fixed: u64,
    /// Bytes of a number, for each matrix of each merged expert.
    value_bytes: BTreeMap<LayerId, Vec<Vec<usize>>>,
}

impl Room {
    /// In a native folder, whose plan has no factors yet.
    pub(super) fn of_folder(
        budget: &SizeBudget,
        source: &Checkpoint,
        plan: &WritePlan,
    ) -> Result<Self> {
        if !source.can_hold_factors() {
            let kind = ErrorKind::Unsupported {
                what: "layout for a size budget",
                found: source.layout().into(),
                supported: "layouts with a tensor for every projection; others hold no factors"
                    .into(),
            };
            return Err(kind.into());
        }
        let sizes = plan.sizes(source)?;
        let mut matrices = 0;
        for (id, experts) in &sizes.value_bytes {
            let info = source.layer(*id)?;
            let values: usize = experts.iter().flatten().sum();
            matrices += (values * info.d_ff * info.d_model) as u64;
        }
        let (whole, written) = match budget.of {
            Portion::Experts => {
                (source.layers().iter().map(|l| l.expert_bytes).sum(), sizes.expert_bytes)
            }
            Portion::Model => (source.total_bytes(), sizes.bytes),
        };
        let (target, fixed) = (budget.bytes(whole), written - matrices);
        Ok(Self { target, fixed, value_bytes: sizes.value_bytes })
    }

    /// In memory, where every number takes four bytes and the experts are all there is.
    pub(super) fn of_layers(
        budget: &SizeBudget,
        layers: &[MoeLayer],
        decided: &Decided,
    ) -> Result<Self> {
        if budget.of == Portion::Model {
            let reason = "a size of the whole model needs the whole model: give one of the experts";
            return Err(ErrorKind::Recipe { reason: reason.into() }.into());
        }
        const EACH: usize = size_of::<f32>();
        let numbers = |expert: &Expert| expert.parameters() * EACH;
        let whole: usize = layers.iter().flat_map(|l| l.experts()).map(numbers).sum();
        let (mut fixed, mut value_bytes) = (0, BTreeMap::new());
        for layer in layers {
            let one = &layer.experts()[0];
            let Some(at) = decided.ids.iter().position(|id| *id == layer.id()) else {
                fixed += layer.experts().iter().map(numbers).sum::<usize>();
                continue;
            };
            let groups = decided.groupings[at].groups();
            let dense: usize = one.view().linears().map(|(_, l)| l.weight.len() * EACH).sum();
            fixed += groups * (numbers(one) - dense);
            value_bytes.insert(layer.id(), vec![vec![EACH; one.view().linears().count()]; groups]);
        }
        let (target, fixed) = (budget.bytes(whole as u64), fixed as u64);
        Ok(Self { target, fixed, value_bytes })
    }
}

impl Pipeline {
    /// The size budget, if that is what the compressor has.
    pub(super) fn size_budget(&self) -> Option<&SizeBudget> {
        match self.compressor.as_ref()? {
            Compressor::Each { budget: CompressionBudget::Size(budget), .. } => Some(budget),
            _ => None,
        }
    }

    /// The pass of its own: merges every decided layer, looks at it, and allocates.
    pub(super) fn ranks(
        &self,
        source: &dyn Source,
        decided: &Decided,
        (budget, room): (&SizeBudget, &Room),
        samples: bool,
        observer: &dyn Observer,
    ) -> Result<Ranks> {
        let plan = Plan {
            recoverer: None,
            compressor: None,
            measure_error: false,
            measure_spectra: Some(false),
            ..self.plan(samples)
        };
        let (mut owners, mut all) = (Vec::new(), Vec::new());
        for (at, (measured, grouping)) in
            decided.measured.iter().zip(&decided.groupings).enumerate()
        {
            let id = engine::announce(observer, &decided.ids, at, Phase::Budget);
            let mut one = || {
                let (merged, _) = engine::merge(source, measured, grouping, &plan, &self.cx)?;
                let stats = source.stats(id, plan.merge_needs())?;
                let spectra = spectra(&merged, &stats, &measured.summary.stats, &self.cx)?;
                let bytes = room
                    .value_bytes
                    .get(&id)
                    .ok_or_else(|| Error::range("layer", "one of the planned target", id))?;
                let roles = spectra.len() / merged.experts.len();
                for (i, mut spectrum) in spectra.into_iter().enumerate() {
                    spectrum.unit = bytes[i / roles][i % roles];
                    owners.push((id, i / roles));
                    all.push(spectrum);
                }
                Ok(())
            };
            one().in_layer(id)?;
        }
        spend(budget, room, &owners, &all)
    }
}

/// Allocates what is left for the matrices, of which `owners` tells layer and expert.
fn spend(
    budget: &SizeBudget,
    room: &Room,
    owners: &[(LayerId, usize)],
    spectra: &[Spectrum],
) -> Result<Ranks> {
    let left = room.target.saturating_sub(room.fixed) as usize;
    let chosen = allocate(spectra, left, budget.least_rank).map_err(|error| {
        // The matrices' share of the bytes says nothing to who asked for a size.
        let Some(least) = least(spectra, budget.least_rank) else { return error };
        let (least, found) = (room.fixed + least, room.target);
        let percent = 100.0 * least as f64 / found.max(1) as f64;
        let reason = format!(
            "the least reachable size is {least} bytes, at rank {} in every matrix: {percent:.1} % \
             of the {found} bytes asked for; keep fewer experts or allow more",
            budget.least_rank
        );
        ErrorKind::Budget { reason }.into()
    })?;
    let mut experts: BTreeMap<LayerId, Vec<Vec<Kept>>> = BTreeMap::new();
    for ((id, expert), allocation) in owners.iter().zip(chosen) {
        let layer = experts.entry(*id).or_default();
        layer.resize_with(layer.len().max(expert + 1), Vec::new);
        layer[*expert].push(match allocation {
            Allocation::Dense => Kept::Dense,
            Allocation::Rank(rank) => {
                Kept::Factors { budget: RankBudget::rank(rank), structure: Structure::Rows }
            }
        });
    }
    Ok(experts.into_iter().map(|(id, experts)| (id, Factoring::new(experts))).collect())
}

/// What the least rank takes in all matrices, if those are spectra at all.
fn least(spectra: &[Spectrum], rank: usize) -> Option<u64> {
    let size = |s: &Spectrum| {
        let (m, n) = s.shape;
        (s.unit * (rank * (m + n)).min(m * n)) as u64
    };
    let valid = spectra.iter().all(|s| s.weight.is_finite() && s.weight >= 0.0);
    valid.then(|| spectra.iter().map(size).sum())
}
