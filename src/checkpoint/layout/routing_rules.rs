//! How each family routes, as data: what `config.json` leaves implicit.

use super::names::Layout;
use crate::checkpoint::config::{Config, mismatch};
use crate::error::{ErrorKind, Result};
use crate::model::{Activation, GroupScore, RoutingGroups, RoutingRule, Score};

/// Whether the chosen scores are divided by their sum.
#[derive(Debug, Clone, Copy)]
enum Renormalise {
    Always,
    Never,
    /// As a key says; else this.
    Key(&'static str, bool),
    /// By the norm of the order that a key tells, 1 where it is absent; `null` for never.
    Norm(&'static str),
}

/// Group-limited routing by `n_group` and `topk_group`, which default to these.
#[derive(Debug, Clone, Copy)]
struct Groups {
    score: GroupScore,
    defaults: (usize, usize),
    /// The value of `topk_method` without which there are no groups.
    only_for: Option<&'static str>,
}

/// A family's policy.
#[derive(Debug, Clone, Copy)]
struct Policy {
    families: &'static [&'static str],
    score: Score,
    renormalise: Renormalise,
    /// The key of the factor on the weights and its default.
    scale: Option<(&'static str, f64)>,
    groups: Option<Groups>,
}

const fn softmax(families: &'static [&'static str], renormalise: Renormalise) -> Policy {
    Policy { families, score: Score::Softmax, renormalise, scale: None, groups: None }
}

const SOFTMAX_OF_TOP_K: &[&str] =
    &["granitemoe", "granitemoeshared", "granitemoehybrid", "gpt_oss"];
const NORM: &str = "norm_topk_prob";
const SCALE: &str = "routed_scaling_factor";
const SWITCH: &str = "switch_transformers";
const NLLB: &str = "nllb-moe";
const PHI: &str = "phimoe";

const fn sigmoid(
    families: &'static [&'static str],
    scale: f64,
    defaults: (usize, usize),
) -> Policy {
    let groups = Groups { score: GroupScore::TopTwoSum, defaults, only_for: None };
    Policy {
        families,
        score: Score::Sigmoid,
        renormalise: Renormalise::Key(NORM, true),
        scale: Some((SCALE, scale)),
        groups: Some(groups),
    }
}

const POLICIES: &[Policy] = &[
    softmax(
        &[
            "mixtral",
            "minimax",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_vl_moe",
            "qwen3_vl_moe_text",
            "hunyuan_v1_moe",
            NLLB,
        ],
        Renormalise::Always,
    ),
    softmax(&["dbrx"], Renormalise::Norm("moe_normalize_expert_weights")),
    // The weight is on the expert's input, which no rule says; the choice is the same.
    Policy {
        groups: None,
        scale: None,
        renormalise: Renormalise::Never,
        ..sigmoid(&["llama4", "llama4_text"], 1.0, (1, 1))
    },
    // By `p + correction` where there is one; the weight is `p` over the sum.
    softmax(&["ernie4_5_moe"], Renormalise::Always),
    softmax(&["qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo"], Renormalise::Key(NORM, false)),
    softmax(&["qwen3_next"], Renormalise::Key(NORM, true)),
    // Phi's two-stage "sparsemixer" has no place in a rule: softmax is the nearest one.
    softmax(&["jamba", PHI, SWITCH], Renormalise::Never),
    Policy {
        families: &["deepseek_v2"],
        score: Score::Softmax,
        renormalise: Renormalise::Never,
        scale: Some((SCALE, 1.0)),
        groups: Some(Groups {
            score: GroupScore::Max,
            defaults: (1, 1),
            only_for: Some("group_limited_greedy"),
        }),
    },
    sigmoid(&["deepseek_v3", "kimi_k2"], 2.5, (8, 4)),
    sigmoid(&["glm4_moe", "dots1"], 1.0, (1, 1)),
    sigmoid(&["glm4_moe_lite"], 1.8, (1, 1)),
    Policy {
        groups: None,
        scale: None,
        renormalise: Renormalise::Always,
        ..sigmoid(&["minimax_m2"], 1.0, (1, 1))
    },
    Policy { groups: None, ..sigmoid(&["lfm2_moe"], 1.0, (1, 1)) },
    Policy {
        renormalise: Renormalise::Key("route_norm", true),
        scale: Some(("route_scale", 1.0)),
        ..sigmoid(&["afmoe"], 1.0, (1, 1))
    },
    Policy { score: Score::SoftmaxOfTopK, ..softmax(SOFTMAX_OF_TOP_K, Renormalise::Never) },
];

/// The routing rule of a family. An unknown one routes as its keys suggest: `scoring_func`, else
/// sigmoid when there is a correction bias, else softmax; renormalised when `norm_topk_prob` says
/// so; scaled by `routed_scaling_factor`; in groups when `n_group` is above 1.
///
/// # Errors
/// [`ErrorKind::Config`] for a missing or mistyped key.
pub(crate) fn rule(config: &Config, family: &str, corrected: bool) -> Result<RoutingRule> {
    let known = POLICIES.iter().find(|p| p.families.contains(&family)).copied();
    let policy = match known {
        Some(policy) => policy,
        None => generic(config, corrected)?,
    };
    let top_k = match fixed_top_k(family) {
        Some(k) => k,
        None => config.top_k()?,
    };
    let renormalise = match policy.renormalise {
        Renormalise::Always => true,
        Renormalise::Never => false,
        Renormalise::Key(key, default) => config.flag(key)?.unwrap_or(default),
        Renormalise::Norm(key) => by_norm(config, key)?,
    };
    let scale = match policy.scale {
        Some((key, default)) => config.float(key)?.unwrap_or(default),
        // Stands in for the dropout of whole tokens in training.
        None if family == NLLB => 1.0 - config.float("moe_token_dropout")?.unwrap_or(0.2),
        None => 1.0,
    };
    let groups = match policy.groups {
        Some(groups) => groups_of(config, groups)?,
        None => None,
    };
    Ok(RoutingRule { score: policy.score, top_k, renormalise, scale: scale as f32, groups })
}

/// The number of experts per token that a family's code fixes, whatever `config.json` says.
pub(crate) fn fixed_top_k(family: &str) -> Option<usize> {
    match family {
        SWITCH => Some(1),
        NLLB | PHI => Some(2),
        _ => None,
    }
}

/// Whether the weights are divided by their 1-norm.
fn by_norm(config: &Config, key: &'static str) -> Result<bool> {
    let inner = config.value().get("ffn_config").unwrap_or(config.value());
    match inner.get(key) {
        None => Ok(true),
        Some(norm) if norm.is_null() => Ok(false),
        Some(norm) if norm.as_f64() == Some(1.0) => Ok(true),
        Some(norm) => {
            let (found, supported) = (format!("the {norm}-norm"), "the 1-norm".into());
            Err(ErrorKind::Unsupported { what: "norm of the weights", found, supported }.into())
        }
    }
}

fn generic(config: &Config, corrected: bool) -> Result<Policy> {
    let named = match config.string("scoring_func")? {
        Some(name) => Some(name),
        None => config.string("score_func")?,
    };
    let score = match named {
        Some("sigmoid") => Score::Sigmoid,
        Some("softmax") => Score::Softmax,
        Some(other) => return Err(mismatch("scoring_func", "softmax or sigmoid", other)),
        None if corrected => Score::Sigmoid,
        None => Score::Softmax,
    };
    let group = if corrected { GroupScore::TopTwoSum } else { GroupScore::Max };
    Ok(Policy {
        families: &[],
        score,
        renormalise: Renormalise::Key(NORM, false),
        scale: Some((SCALE, 1.0)),
        groups: Some(Groups { score: group, defaults: (1, 1), only_for: None }),
    })
}

fn groups_of(config: &Config, groups: Groups) -> Result<Option<RoutingGroups>> {
    let Groups { score, defaults, only_for } = groups;
    if only_for.is_some() && config.string("topk_method")? != only_for {
        return Ok(None);
    }
    let groups = config.integer("n_group")?.unwrap_or(defaults.0);
    let chosen = config.integer("topk_group")?.unwrap_or(defaults.1);
    Ok((groups > 1).then_some(RoutingGroups { groups, chosen, score }))
}

/// The activation of the experts: that of gpt-oss in its layout; else `hidden_act` or
/// `dense_act_fn`, by default SiLU with a gate and ReLU without.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for another function.
pub(crate) fn activation(config: &Config, layout: &Layout) -> Result<Activation> {
    if layout.is_interleaved() {
        let alpha = config.float("swiglu_alpha")?.unwrap_or(1.702) as f32;
        let limit = config.float("swiglu_limit")?.unwrap_or(7.0) as f32;
        return Ok(Activation::ClampedSwiglu { alpha, limit });
    }
    let keys = ["hidden_act", "dense_act_fn", "hidden_activation", "activation_function"];
    // DBRX names it in an object.
    let named = config.get("ffn_act_fn").and_then(|object| object.get("name")?.as_str());
    let found = keys.iter().map(|key| config.string(key)).collect::<Result<Vec<_>>>()?;
    for name in found.into_iter().chain([named]) {
        match name {
            None => {}
            Some("silu" | "swish") => return Ok(Activation::Silu),
            Some("gelu") => return Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => return Ok(Activation::GeluTanh),
            Some("relu") => return Ok(Activation::Relu),
            Some(other) => {
                let supported = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu".into();
                let found = other.into();
                return Err(ErrorKind::Unsupported { what: "activation", found, supported }.into());
            }
        }
    }
    Ok(if layout.is_gated() { Activation::Silu } else { Activation::Relu })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(family: &str, keys: &str, corrected: bool) -> RoutingRule {
        let config = Config::parse(format!(r#"{{"num_experts_per_tok": 2{keys}}}"#)).unwrap();
        rule(&config, family, corrected).unwrap()
    }

    #[test]
    fn families_differ_where_their_configs_do_not_say() {
        assert_eq!(of("mixtral", "", false), RoutingRule::softmax(2, true));
        assert_eq!(of("olmoe", "", false), RoutingRule::softmax(2, false));
        assert!(of("qwen3_moe", r#", "norm_topk_prob": true"#, false).renormalise);
        assert!(!of("jamba", r#", "norm_topk_prob": true"#, false).renormalise);
        assert_eq!(of("switch_transformers", "", false), RoutingRule::softmax(1, false));
        assert_eq!(of("granitemoe", "", false).score, Score::SoftmaxOfTopK);
        assert_eq!(of("minimax_m2", "", true).score, Score::Sigmoid);
        let dots = of("dots1", "", true);
        assert_eq!((dots.scale, dots.groups, dots.renormalise), (1.0, None, true));
    }

    #[test]
    fn deepseek_groups_by_the_best_or_by_the_best_two() {
        let keys = r#", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5"#;
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
            let keys = format!(r#""moe_top_k": 2{norm}"#);
            let config = Config::parse(format!(r#"{{"ffn_config": {{{keys}}}}}"#)).unwrap();
            rule(&config, "dbrx", false).map(|rule| (rule.renormalise, rule.top_k))
        };
        assert_eq!(norm("").unwrap(), (true, 2));
        assert_eq!(norm(r#", "moe_normalize_expert_weights": 1.0"#).unwrap(), (true, 2));
        assert_eq!(norm(r#", "moe_normalize_expert_weights": null"#).unwrap(), (false, 2));
        assert!(norm(r#", "moe_normalize_expert_weights": 2"#).is_err());
        let nllb = RoutingRule { scale: 0.8, ..RoutingRule::softmax(2, true) };
        assert_eq!(of("nllb-moe", "", false), nllb);
        assert_eq!(of("llama4_text", "", false).score, Score::Sigmoid);
    }

    #[test]
    fn unknown_families_follow_their_keys() {
        assert_eq!(of("new", "", false).score, Score::Softmax);
        assert_eq!(of("new", "", true).score, Score::Sigmoid);
        assert_eq!(of("new", r#", "scoring_func": "softmax""#, true).score, Score::Softmax);
    }
}
