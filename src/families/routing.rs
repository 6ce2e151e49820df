//! How each family's router chooses and weighs: what `config.json` leaves implicit, as data.

use super::keys::Keys;
use crate::error::{ErrorKind, Result};
use crate::model::{GroupScore, RoutingGroups, RoutingRule, Score};

/// Whether the chosen scores are divided by their sum.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Renormalise {
    /// They are.
    Always,
    /// They are not.
    Never,
    /// As a key says; the class default where it is absent.
    Key(&'static str, bool),
    /// By the norm of the order that a key of `ffn_config` states, 1 where it is absent; `null` for
    /// never (DBRX).
    Norm(&'static str),
}

/// The factor on the weights.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scale {
    /// None.
    One,
    /// The value of a key; the class default where it is absent.
    Key(&'static str, f64),
    /// One minus the value of a key, likewise.
    OneMinus(&'static str, f64),
}

/// Group-limited routing by `n_group` and `topk_group`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    /// How a group is scored.
    pub(crate) score: GroupScore,
    /// The class defaults of the two keys.
    pub(crate) defaults: (usize, usize),
    /// The value of `topk_method` without which there are no groups.
    pub(crate) only_for: Option<&'static str>,
}

/// A family's routing policy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Routing {
    /// From logits to scores.
    pub(crate) score: Score,
    /// Whether the chosen scores are divided by their sum.
    pub(crate) renormalise: Renormalise,
    /// The factor on the weights.
    pub(crate) scale: Scale,
    /// Group-limited routing.
    pub(crate) groups: Option<Groups>,
    /// The number of experts per token that the family's code fixes, whatever `config.json` says.
    pub(crate) fixed_top_k: Option<usize>,
}

/// The usual key of [`Renormalise::Key`].
pub(crate) const NORM_TOPK_PROB: &str = "norm_topk_prob";
/// The usual key of [`Scale::Key`].
pub(crate) const ROUTED_SCALING_FACTOR: &str = "routed_scaling_factor";

impl Routing {
    /// Softmax over all experts, then the top k.
    pub(crate) const fn softmax(renormalise: Renormalise) -> Self {
        let (score, scale) = (Score::Softmax, Scale::One);
        Self { score, renormalise, scale, groups: None, fixed_top_k: None }
    }

    /// The top k, then softmax over them.
    pub(crate) const SOFTMAX_OF_TOP_K: Self =
        Self { score: Score::SoftmaxOfTopK, ..Self::softmax(Renormalise::Never) };

    /// Sigmoid, weights not divided and not scaled.
    pub(crate) const SIGMOID: Self =
        Self { score: Score::Sigmoid, ..Self::softmax(Renormalise::Never) };

    /// DeepSeek-V3's: sigmoid, choice by corrected scores within the best groups (class defaults
    /// of `n_group` and `topk_group`), divided as `norm_topk_prob` says (true by default), scaled.
    pub(crate) const fn deepseek_v3(scale: f64, defaults: (usize, usize)) -> Self {
        Self {
            renormalise: Renormalise::Key(NORM_TOPK_PROB, true),
            scale: Scale::Key(ROUTED_SCALING_FACTOR, scale),
            groups: Some(Groups { score: GroupScore::TopTwoSum, defaults, only_for: None }),
            ..Self::SIGMOID
        }
    }

    /// The policy of a family that is in no table, as its keys suggest: `scoring_func`, else
    /// sigmoid when there is a correction bias, else softmax; divided when `norm_topk_prob` says
    /// so; scaled by `routed_scaling_factor`; in groups when `n_group` is above 1.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for another function.
    pub(crate) fn suggested(keys: Keys<'_>, corrected: bool) -> Result<Self> {
        let named = match keys.text("scoring_func")? {
            Some(name) => Some(name),
            None => keys.text("score_func")?,
        };
        let score = match named {
            Some("sigmoid") => Score::Sigmoid,
            Some("softmax") => Score::Softmax,
            Some(other) => return Err(keys.wrong("scoring_func", "softmax or sigmoid", other)),
            None if corrected => Score::Sigmoid,
            None => Score::Softmax,
        };
        let group = if corrected { GroupScore::TopTwoSum } else { GroupScore::Max };
        Ok(Self {
            score,
            renormalise: Renormalise::Key(NORM_TOPK_PROB, false),
            scale: Scale::Key(ROUTED_SCALING_FACTOR, 1.0),
            groups: Some(Groups { score: group, defaults: (1, 1), only_for: None }),
            fixed_top_k: None,
        })
    }

    /// The rule of a configuration; `top_k` as its keys say.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a mistyped key, [`ErrorKind::Unsupported`] for another norm.
    pub(crate) fn rule(&self, keys: Keys<'_>, top_k: usize) -> Result<RoutingRule> {
        let renormalise = match self.renormalise {
            Renormalise::Always => true,
            Renormalise::Never => false,
            Renormalise::Key(key, default) => keys.flag(key, default)?,
            Renormalise::Norm(key) => divides_by_norm(keys, key)?,
        };
        let scale = match self.scale {
            Scale::One => 1.0,
            Scale::Key(key, default) => keys.number(key)?.unwrap_or(default),
            Scale::OneMinus(key, default) => 1.0 - keys.number(key)?.unwrap_or(default),
        };
        let groups = self.groups.map(|groups| groups.read(keys)).transpose()?.flatten();
        Ok(RoutingRule { score: self.score, top_k, renormalise, scale: scale as f32, groups })
    }
}

impl Groups {
    fn read(self, keys: Keys<'_>) -> Result<Option<RoutingGroups>> {
        if self.only_for.is_some() && keys.text("topk_method")? != self.only_for {
            return Ok(None);
        }
        let groups = keys.count("n_group")?.unwrap_or(self.defaults.0);
        let chosen = keys.count("topk_group")?.unwrap_or(self.defaults.1);
        Ok((groups > 1).then_some(RoutingGroups { groups, chosen, score: self.score }))
    }
}

/// Whether the weights are divided by their 1-norm. Here `null` is not the absence of the key.
fn divides_by_norm(keys: Keys<'_>, key: &'static str) -> Result<bool> {
    match keys.raw(key) {
        None => Ok(true),
        Some(norm) if norm.is_null() => Ok(false),
        Some(norm) if norm.as_f64() == Some(1.0) => Ok(true),
        Some(norm) => {
            let (found, supported) = (format!("the {norm}-norm"), "the 1-norm".into());
            Err(ErrorKind::Unsupported { what: "norm of the weights", found, supported }.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{WITHIN, find};
    use super::*;

    fn of(family: &str, keys: &str, corrected: bool) -> RoutingRule {
        let config = serde_json::from_str(&format!("{{{keys}}}")).unwrap();
        let keys = Keys::of_model(&config, &WITHIN);
        let suggested = || Routing::suggested(keys, corrected).unwrap();
        let routing = find(family).map_or_else(suggested, |family| family.routing);
        routing.rule(keys, routing.fixed_top_k.unwrap_or(2)).unwrap()
    }

    #[test]
    fn families_differ_where_their_configs_do_not_say() {
        assert_eq!(of("mixtral", "", false), RoutingRule::softmax(2, true));
        assert_eq!(of("olmoe", "", false), RoutingRule::softmax(2, false));
        assert!(of("qwen3_moe", r#""norm_topk_prob": true"#, false).renormalise);
        assert!(!of("jamba", r#""norm_topk_prob": true"#, false).renormalise);
        assert_eq!(of("switch_transformers", "", false), RoutingRule::softmax(1, false));
        assert_eq!(of("granitemoe", "", false).score, Score::SoftmaxOfTopK);
        assert_eq!(of("minimax_m2", "", true).score, Score::Sigmoid);
        let dots = of("dots1", "", true);
        assert_eq!((dots.scale, dots.groups, dots.renormalise), (1.0, None, false));
        assert!(of("qwen4_exp", "", false).renormalise);
    }

    #[test]
    fn deepseek_groups_by_the_best_or_by_the_best_two() {
        let keys = r#""n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5"#;
        let groups = |score| Some(RoutingGroups { groups: 4, chosen: 2, score });
        let v3 = of("deepseek_v3", keys, true);
        assert_eq!((v3.scale, v3.groups), (1.5, groups(GroupScore::TopTwoSum)));
        assert_eq!(of("deepseek_v2", keys, false).groups, None);
        let limited = format!(r#"{keys}, "topk_method": "group_limited_greedy""#);
        let v2 = of("deepseek_v2", &limited, false);
        assert_eq!((v2.renormalise, v2.scale), (false, 1.5));
        assert_eq!(v2.groups, groups(GroupScore::Max));
    }

    #[test]
    fn the_order_of_the_norm_is_in_the_blocks_own_keys() {
        let norm = |norm: &str| {
            let config = serde_json::from_str(&format!(r#"{{"ffn_config": {{{norm}}}}}"#)).unwrap();
            let routing = find("dbrx").unwrap().routing;
            routing.rule(Keys::of_model(&config, &WITHIN), 2).map(|rule| rule.renormalise)
        };
        assert!(norm("").unwrap());
        assert!(norm(r#""moe_normalize_expert_weights": 1.0"#).unwrap());
        assert!(!norm(r#""moe_normalize_expert_weights": null"#).unwrap());
        assert!(norm(r#""moe_normalize_expert_weights": 2"#).is_err());
        let nllb = RoutingRule { scale: 0.8, ..RoutingRule::softmax(2, true) };
        assert_eq!(of("nllb-moe", "", false), nllb);
        assert_eq!(of("llama4_text", "", false).score, Score::Sigmoid);
    }

    #[test]
    fn unknown_families_follow_their_keys() {
        assert_eq!(of("new", "", false).score, Score::Softmax);
        assert_eq!(of("new", "", true).score, Score::Sigmoid);
        assert_eq!(of("new", r#""scoring_func": "softmax""#, true).score, Score::Softmax);
    }
}
