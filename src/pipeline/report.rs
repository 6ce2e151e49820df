//! What a run did, as data.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{MANIFEST, read_json};
use crate::error::Result;
use crate::model::{Expert, Grouping, LayerId, Role, RoutingRule};
use crate::pipeline::provenance::CalibrationReport;

/// A count before and after.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Change<T> {
    /// In the source.
    pub before: T,
    /// In the result.
    pub after: T,
}

impl Change<u64> {
    /// Share that was removed, 0 to 1; negative when it grew.
    pub fn saved(&self) -> f64 {
        if self.before == 0 { 0.0 } else { 1.0 - self.after as f64 / self.before as f64 }
    }
}

/// One group of a merged layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The dominant expert.
    pub dominant: usize,
    /// All members, ascending.
    pub members: Vec<usize>,
    /// The share of the layer's routed (token, slot) pairs that went to the members.
    pub usage: f64,
}

/// Relative squared output errors `Σ‖y − y'‖² / Σ‖y‖²` of the routed experts on the samples'
/// inputs; present when the statistics hold samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    /// With the `n`-row router and the expert map (native, expanded).
    pub mapped: f64,
    /// With the narrowed router (stock), if there is one.
    pub narrowed: Option<f64>,
}

/// Mean stable ranks `‖W‖_F² / ‖W‖₂²` over the matrices of a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StableRanks {
    /// Of the source: for every group the mean over its members.
    pub original: f64,
    /// After merging and recovery.
    pub merged: f64,
    /// After compression.
    pub compressed: f64,
    /// Mean of `(merged − original)/original` over matrices, which the paper plots: negative where
    /// merging makes experts more compressible.
    pub merging: f64,
    /// Mean of `(compressed − merged)/merged`.
    pub compressing: f64,
}

/// What compression did. Native folders hold the factors where every projection has a tensor of its
/// own; all others hold `L R + S` multiplied out, and these are the figures of a runtime that would
/// hold the factors. [`WrittenReport`] has what lies on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CompressionReport {
    /// Parameters of the merged experts, dense and factored: `r (m + n) + k n` a matrix, and the
    /// biases.
    pub parameters: Change<u64>,
    /// Operations per token of routed experts and router after merging, dense and factored.
    pub flops_per_token: Change<u64>,
    /// How compressible the matrices are.
    pub stable_rank: StableRanks,
}

impl CompressionReport {
    /// Over all layers: sums, and means of the stable ranks.
    pub(crate) fn total(layers: &[LayerReport]) -> Option<Self> {
        let all: Vec<&Self> = layers.iter().filter_map(|l| l.compression.as_ref()).collect();
        let sum = |of: fn(&Self) -> Change<u64>| Change {
            before: all.iter().map(|c| of(c).before).sum(),
            after: all.iter().map(|c| of(c).after).sum(),
        };
        let mean = |of: fn(&StableRanks) -> f64| {
            all.iter().map(|c| of(&c.stable_rank)).sum::<f64>() / all.len() as f64
        };
        (!all.is_empty()).then(|| Self {
            parameters: sum(|c| c.parameters),
            flops_per_token: sum(|c| c.flops_per_token),
            stable_rank: StableRanks {
                original: mean(|r| r.original),
                merged: mean(|r| r.merged),
                compressed: mean(|r| r.compressed),
                merging: mean(|r| r.merging),
                compressing: mean(|r| r.compressing),
            },
        })
    }
}

/// Singular values of one kind of a layer's matrices, divided by the largest of their matrix: means
/// over experts, at most 4 of them, evenly apart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpectrumReport {
    /// Which matrices.
    pub role: Role,
    /// Which singular values, from 1 for the largest; evenly apart in their logarithm.
    pub index: Vec<u32>,
    /// Of the source's experts.
    pub original: Vec<f32>,
    /// Of the merged and recovered ones.
    pub merged: Vec<f32>,
    /// Of the compressed ones, if there was a compressor; fewer where it made matrices smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed: Option<Vec<f32>>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Which layer it is.
    pub layer: LayerId,
    /// Number of experts.
    pub experts: Change<u64>,
    /// Parameters of the routed experts.
    pub expert_parameters: Change<u64>,
    /// Floating-point operations per token of routed experts and router (a multiply-add is two).
    pub flops_per_token: Change<u64>,
    /// Activation frequency of every expert.
    pub usage: Vec<f64>,
    /// Calibration tokens that reached every expert.
    #[serde(default)]
    pub tokens: Vec<u64>,
    /// Similarity of every pair, row by row.
    pub similarity: Vec<Vec<f32>>,
    /// The groups; experts in none were dropped.
    pub groups: Vec<GroupReport>,
    /// Experts that were dropped.
    pub dropped: Vec<usize>,
    /// Output error on the samples, after recovery and compression.
    pub output_error: Option<OutputError>,
    /// What compression did, if there was a compressor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionReport>,
    /// Singular values of gate, up and down, where they were measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spectra: Vec<SpectrumReport>,
}

/// What happened to an expert of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertOutcome {
    /// It is in the target as it was.
    Kept,
    /// It is in the target, changed by recovery or compression.
    Refitted,
    /// It became one expert with others.
    Merged,
    /// It is not in the target; its tokens visit the dominant expert of its group.
    Redirected,
    /// It is not in the target, and the router can no longer choose it.
    Dropped,
}

impl std::fmt::Display for ExpertOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Kept => "kept",
            Self::Refitted => "refitted",
            Self::Merged => "merged",
            Self::Redirected => "redirected",
            Self::Dropped => "dropped",
        })
    }
}

/// The written folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WrittenReport {
    /// `stock`, `native` or `expanded`.
    pub export: String,
    /// Bytes of all tensors.
    pub tensor_bytes: Change<u64>,
    /// Bytes of the routed experts.
    pub expert_bytes: Change<u64>,
    /// Parameters of the whole model.
    pub parameters: Change<u64>,
    /// Tensors of the source that are not in the target, with the reason.
    pub dropped: Vec<(String, String)>,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this crate.
    pub mcsmoe_version: String,
    /// The family (`model_type`) of the source, if it was a checkpoint.
    pub family: Option<String>,
    /// The recipe, if the run came from one.
    pub recipe: Option<serde_json::Value>,
    /// Names of the stages that ran, in order.
    pub stages: Vec<String>,
    /// The device that computed.
    pub device: String,
    /// Who factorised: `pure-rust`, `lapack`, or the name of one's own.
    #[serde(default)]
    pub factorise: String,
    /// Seed of every random choice.
    pub seed: u64,
    /// Tokens that the statistics were gathered on.
    pub tokens: u64,
    /// What the statistics come from, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationReport>,
    /// Experts over all merged layers.
    pub experts: Change<u64>,
    /// Parameters of the routed experts, over all merged layers.
    pub expert_parameters: Change<u64>,
    /// Operations per token over all merged layers.
    pub flops_per_token: Change<u64>,
    /// What compression did over all merged layers, if there was a compressor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionReport>,
    /// What was written, if there was a target.
    pub written: Option<WrittenReport>,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// The report as indented JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) if it cannot be written, which only a
    /// non-finite number could cause.
    pub fn to_json(&self) -> crate::Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| {
            crate::ErrorKind::Format { format: "report", reason: e.to_string() }.into()
        })
    }

    /// The report in a folder that a run has written, or in a file of [`Report::to_json`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::Format`](crate::ErrorKind::Format)
    /// with the file when it holds none.
    pub fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join(MANIFEST) } else { path.to_owned() };
        read_json(&file, "read report", "report")
    }

    /// The report as a JSON value, for the manifest of a folder.
    pub(crate) fn to_value(&self) -> crate::Result<serde_json::Value> {
        to_value("report", self)
    }

    /// Experts of the source that fewer than `tokens` calibration tokens reached, by layer: what is
    /// decided on them rests on little.
    pub fn rarely_reached(&self, tokens: u64) -> Vec<(LayerId, Vec<usize>)> {
        let rare = |layer: &LayerReport| {
            let counts = layer.tokens.iter().enumerate();
            let few: Vec<usize> = counts.filter(|(_, n)| **n < tokens).map(|(e, _)| e).collect();
            (!few.is_empty()).then_some((layer.layer, few))
        };
        self.layers.iter().filter_map(rare).collect()
    }

    /// The name of the method that was a stage, such as `"merge"`.
    pub fn method(&self, stage: &str) -> Option<&str> {
        let of_stage = |text: &String| text.split_once(' ').is_some_and(|(kind, _)| kind == stage);
        self.stages.iter().find(|text| of_stage(text))?.split_once(' ').map(|(_, method)| method)
    }

    /// What happened to every expert of a layer, in order. Which experts are grouped does not say
    /// it: with the merger `dominant-only` a group is its dominant expert, to which an expert map
    /// (native, expanded) sends the tokens of the others, and a narrowed router (stock) does not.
    pub fn outcomes(&self, layer: &LayerReport) -> Vec<ExpertOutcome> {
        let changed = self.method("recover").is_some() || self.method("compress").is_some();
        let stays = if changed { ExpertOutcome::Refitted } else { ExpertOutcome::Kept };
        let merges = self.method("merge") != Some("dominant-only");
        let absent = match self.method("router") {
            Some(_) => ExpertOutcome::Dropped,
            None => ExpertOutcome::Redirected,
        };
        let mut outcomes = vec![ExpertOutcome::Dropped; layer.experts.before as usize];
        for group in &layer.groups {
            for &member in &group.members {
                let outcome = match (group.members.len(), merges) {
                    (1, _) => stays,
                    (_, true) => ExpertOutcome::Merged,
                    (_, false) if member == group.dominant => stays,
                    (_, false) => absent,
                };
                if let Some(place) = outcomes.get_mut(member) {
                    *place = outcome;
                }
            }
        }
        outcomes
    }

    /// How many experts of all layers had each outcome.
    pub fn outcome_counts(&self) -> BTreeMap<ExpertOutcome, u64> {
        let mut counts = BTreeMap::new();
        for outcome in self.layers.iter().flat_map(|layer| self.outcomes(layer)) {
            *counts.entry(outcome).or_insert(0) += 1;
        }
        counts
    }

    /// Sums a per-layer figure over all layers.
    pub(crate) fn total(
        layers: &[LayerReport],
        of: impl Fn(&LayerReport) -> Change<u64>,
    ) -> Change<u64> {
        let sum = |pick: fn(Change<u64>) -> u64| layers.iter().map(|l| pick(of(l))).sum();
        Change { before: sum(|c| c.before), after: sum(|c| c.after) }
    }
}

/// `2 k · (parameters of one expert) + 2 n d_model`: the routed experts and the router.
pub(crate) fn flops_per_token(kind: Kind, rule: &RoutingRule, router_rows: usize) -> u64 {
    let experts = 2 * rule.top_k as u64 * kind.parameters;
    experts + 2 * router_rows as u64 * kind.d_model
}

/// What the report needs to know of a layer's experts, which are all of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) parameters: u64,
    pub(crate) d_model: u64,
}

impl Kind {
    pub(crate) fn of(expert: &Expert) -> Self {
        let d_model = expert.view().d_model() as u64;
        Self { parameters: expert.parameters() as u64, d_model }
    }
}

/// Rounded similarities, row by row: six digits are what a picture or a comparison can use.
pub(crate) fn rounded(similarity: ArrayView2<'_, f64>) -> Vec<Vec<f32>> {
    let round = |s: &f64| ((s * 1e6).round() / 1e6) as f32;
    similarity.rows().into_iter().map(|row| row.iter().map(round).collect()).collect()
}

/// Groups and dropped experts of a layer.
pub(crate) fn groups_of(grouping: &Grouping, usage: &[f64]) -> (Vec<GroupReport>, Vec<usize>) {
    let group = |g: usize| {
        let members = grouping.members(g);
        let usage = members.iter().map(|&i| usage[i]).sum();
        GroupReport { dominant: grouping.dominants()[g], members, usage }
    };
    let dropped = (0..grouping.experts()).filter(|&i| grouping.labels()[i].is_none()).collect();
    ((0..grouping.groups()).map(group).collect(), dropped)
}

/// A JSON value; an error for what JSON cannot hold, as a number that is not finite.
pub(crate) fn to_value(
    format: &'static str,
    value: &impl Serialize,
) -> crate::Result<serde_json::Value> {
    serde_json::to_value(value)
        .map_err(|e| crate::ErrorKind::Format { format, reason: e.to_string() }.into())
}
