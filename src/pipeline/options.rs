//! What the pipeline decides beside its stages: how many experts stay, which are protected, when
//! experts are lined up, and what a narrowed router may do.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::align::Reference;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Budget, LayerId, RoutingRule, Target};
use crate::stage::Aligner;

/// How many experts stay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Keep {
    /// This many per layer; the average where the grouper spreads a global budget.
    Experts(usize),
    /// This share of the experts, above 0 and at most 1, rounded to the nearest number.
    Fraction(f64),
    /// This many over all merged layers together.
    Total(usize),
}

/// Constraints on the groups.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "snake_case", deny_unknown_fields)]
pub struct Constraints {
    /// Layers that keep every expert.
    pub protect_layers: BTreeSet<LayerId>,
    /// Experts that stay alone.
    pub protect_experts: BTreeMap<LayerId, BTreeSet<usize>>,
    /// Largest number of members of a group.
    pub group_capacity: Option<usize>,
    /// Least number of experts in any layer. 1, or top-k where the router is narrowed.
    pub min_per_layer: Option<usize>,
}

/// When experts are lined up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlignWhen {
    /// Once over the whole layer, before similarities are computed (the paper's order). Metrics on
    /// weights then compare lined-up experts.
    BeforeGrouping,
    /// Inside each group, after grouping. Fewer assignments, and each to its own reference.
    #[default]
    InGroups,
}

/// What a recoverer is fitted on, in a run on text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoverOn {
    /// Inputs: what the layers before, merged and recovered, make of the text. Targets: what the
    /// original layer gives on the same inputs (NAEE's progressive order, arXiv 2402.14800;
    /// GPTQ's). Runs the text through the original's layers a second time, and through the merged
    /// ones.
    #[default]
    SameInput,
    /// The same inputs. Targets: what the original layer gives where the layers before it are the
    /// original's, too (GPTAQ's asymmetric calibration, arXiv 2504.02692), so that a layer also
    /// makes up for what its inputs have lost. Runs the text through the merged layers besides.
    OwnStream,
    /// Inputs and targets are the original model's, as calibration sees them: every layer for
    /// itself. Runs the text through nothing else, and layers do not make up for those before them.
    Original,
}

impl RecoverOn {
    /// Whether the text runs through the merged layers.
    pub(crate) fn follows(self) -> bool {
        self != Self::Original
    }

    /// Whether the original's own stream gives targets.
    pub(crate) fn captures_original(self) -> bool {
        self != Self::SameInput
    }
}

/// What happens to group-limited routing when the router is narrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingGroupPolicy {
    /// The routing groups stay: experts merge only inside one, the same number in each.
    #[default]
    Keep,
    /// One routing group: any experts may merge, and the choice is no longer limited.
    Flatten,
}

/// An aligner and how it is used.
#[derive(Debug)]
pub struct Alignment {
    /// The method.
    pub aligner: Box<dyn Aligner>,
    /// Whose order of hidden units is kept.
    pub reference: Reference,
    /// When.
    pub when: AlignWhen,
}

/// The number of experts of each layer that takes part, with its routing policy after merging.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerShape {
    pub(crate) id: LayerId,
    pub(crate) experts: usize,
    pub(crate) rule: RoutingRule,
}

impl Keep {
    /// The target over `layers`. A narrowed router needs the same number everywhere; otherwise the
    /// grouper is given the total, and its spread decides who keeps how many.
    pub(crate) fn target(self, layers: &[LayerShape], narrow: bool) -> Result<Target> {
        let total: usize = layers.iter().map(|l| l.experts).sum();
        let same = layers.windows(2).all(|w| w[0].experts == w[1].experts);
        match self {
            Self::Experts(m) if narrow => Ok(Target::PerLayer(m)),
            Self::Experts(m) => Ok(Target::Total(m * layers.len())),
            Self::Total(t) => Ok(Target::Total(t)),
            Self::Fraction(f) if f > 0.0 && f <= 1.0 => {
                let of = |n: usize| ((n as f64 * f).round() as usize).max(1);
                match layers.first() {
                    Some(first) if same => Self::Experts(of(first.experts)).target(layers, narrow),
                    _ => Ok(Target::Total(of(total))),
                }
            }
            Self::Fraction(f) => Err(Error::range("fraction of experts to keep", "(0, 1]", f)),
        }
    }
}

impl Constraints {
    /// The budget of a set of layers that all take part.
    pub(crate) fn budget(&self, target: Target, layers: &[LayerShape], narrow: bool) -> Budget {
        let top_k = layers.iter().map(|l| l.rule.top_k).max().unwrap_or(1);
        Budget {
            target,
            min_per_layer: self.min_per_layer.unwrap_or(if narrow { top_k } else { 1 }).max(1),
            group_capacity: self.group_capacity,
            protected: self.protect_experts.clone(),
        }
    }

    /// Refuses protections of layers or experts that do not exist.
    pub(crate) fn check(&self, layers: &[LayerShape]) -> Result<()> {
        let known = |id: &LayerId| layers.iter().find(|l| l.id == *id);
        let layer_names = self.protect_layers.iter().chain(self.protect_experts.keys());
        if let Some(id) = layer_names.into_iter().find(|id| known(id).is_none()) {
            return Err(Error::range("protected layer", "an MoE layer of the model", id));
        }
        for (id, experts) in &self.protect_experts {
            let n = known(id).map_or(0, |l| l.experts);
            if let Some(&bad) = experts.iter().find(|&&e| e >= n) {
                let what = format!("protected expert of {id}");
                return Err(Error::range(what, format!("below {n}"), bad));
            }
        }
        match self.group_capacity {
            Some(0) => Err(Error::range("group capacity", "1 or more", 0)),
            _ => Ok(()),
        }
    }
}

/// Checks what a narrowed router can do before any weight is read.
pub(crate) fn check_narrowed(layers: &[LayerShape], target: Target) -> Result<()> {
    let Target::PerLayer(m) = target else {
        let reason = "a stock export needs the same number of experts in every layer: \
                      give `experts` or `fraction` instead of `total`";
        return Err(ErrorKind::Budget { reason: reason.into() }.into());
    };
    for LayerShape { id, rule, .. } in layers {
        if m < rule.top_k {
            let reason = format!(
                "{id} would keep {m} experts, but the router chooses {}: keep at least that many, \
                 or lower top_k",
                rule.top_k
            );
            return Err(ErrorKind::Budget { reason }.into());
        }
        if let Some(misfit) = rule.groups.and_then(|g| g.misfit(m, rule.top_k)) {
            let reason = format!(
                "{id} would keep {m} experts: {misfit}; choose another number, or set \
                 routing_groups = \"flatten\""
            );
            return Err(ErrorKind::Budget { reason }.into());
        }
    }
    Ok(())
}
