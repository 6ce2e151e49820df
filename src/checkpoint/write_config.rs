//! The target's `config.json`: the source's text with a few values replaced.

use super::config::{self, Config, Edit, mismatch};
use super::native::{NATIVE, Native};
use super::open::Checkpoint;
use super::quant;
use super::write::{Export, WritePlan};
use super::write_check::drops_mtp;
use crate::error::Result;

/// What native folders call their architecture, so that no runtime takes them for the original.
const ARCHITECTURE: &str = r#"["McsmoeForCausalLM"]"#;
/// Which classes of [`MODELING`] transformers runs such a folder with, given leave to.
const AUTO_MAP: &str = r#"{
    "AutoConfig": "modeling_mcsmoe.McsmoeConfig",
    "AutoModelForCausalLM": "modeling_mcsmoe.McsmoeForCausalLM",
    "AutoModelForSeq2SeqLM": "modeling_mcsmoe.McsmoeForSeq2SeqLM"
  }"#;
/// The name and the text of those classes, which lie in every native folder.
pub(super) const MODELING: (&str, &str) =
    ("modeling_mcsmoe.py", include_str!("modeling_mcsmoe.py"));

/// The text of the target's config; `experts` is the stock export's number of experts.
pub(super) fn config(
    source: &Checkpoint,
    plan: &WritePlan,
    experts: Option<usize>,
) -> Result<String> {
    // No weight of the target is quantised.
    let config = &source.config().without(quant::KEY)?;
    let mut everywhere = Vec::new();
    let mut set = |keys: &[&'static str], value: usize| {
        everywhere.extend(keys.iter().map(|key| (*key, value.to_string())));
    };
    if drops_mtp(plan) && !source.mtp.is_empty() {
        set(config::MTP, 0);
    }
    let grouped = source.layers().iter().any(|l| l.rule.groups.is_some());
    if plan.flatten_groups && grouped {
        for key in ["n_group", "topk_group"] {
            if config.get(key).is_none() {
                return Err(mismatch(key, "a number to set to 1", "nothing"));
            }
        }
        set(&["n_group", "topk_group"], 1);
    }
    if let Some(k) = plan.top_k {
        let lowered = source.layers().iter().any(|l| l.rule.top_k != k);
        set(if lowered { config::TOP_K } else { &[] }, k);
    }
    if let Some(m) = experts {
        let n = config.experts()?;
        if m != n {
            set(config::EXPERTS, m);
            if let Some(capacity) = config.integer("expert_capacity")? {
                set(&["expert_capacity"], capacity.saturating_mul(n).div_ceil(m.max(1)));
            }
        }
    }
    match plan.export {
        Export::Native => native(config, plan, &everywhere),
        Export::Stock | Export::Expanded => config.edited(&everywhere, &[]),
    }
}

fn native(config: &Config, plan: &WritePlan, everywhere: &[Edit]) -> Result<String> {
    let map = Native::new(config, plan.groupings.clone());
    let map = serde_json::to_string(&map).map_err(|e| mismatch(NATIVE, "a JSON object", e))?;
    let mut added = format!("\"{NATIVE}\",\n  \"{NATIVE}\": {map}");
    let mut top = vec![("architectures", ARCHITECTURE.to_owned())];
    if config.has_top("auto_map") {
        top.push(("auto_map", AUTO_MAP.to_owned()));
    } else {
        added.push_str(&format!(",\n  \"auto_map\": {AUTO_MAP}"));
    }
    if config.has_top("model_type") {
        top.push(("model_type", added));
        return config.edited(everywhere, &top);
    }
    let text = config.edited(everywhere, &top)?;
    Ok(text.replacen('{', &format!("{{\n  \"model_type\": {added},"), 1))
}
