//! The target's `config.json`: the source's text with a few values replaced.

use super::request::{Export, WritePlan};
use crate::checkpoint::config::{Config, EXPERTS, Edit, MTP, NATIVE, Native, TOP_K, mismatch};
use crate::checkpoint::quant::schemes;
use crate::checkpoint::read::Checkpoint;
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

/// The spellings of the number of shared experts, as wide as the routed ones.
const SHARED: [&str; 4] =
    ["n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"];

/// The text of the target's config; `experts` is the stock export's number of experts.
pub(super) fn config(
    source: &Checkpoint,
    plan: &WritePlan,
    experts: Option<usize>,
) -> Result<String> {
    // No weight of the target is quantised.
    let config = &source.config().without(schemes::KEY)?;
    let mut everywhere = Vec::new();
    let mut set = |keys: &[&'static str], value: usize| {
        everywhere.extend(keys.iter().map(|key| (*key, value.to_string())));
    };
    if plan.drops_mtp() && !source.mtp.is_empty() {
        set(MTP, 0);
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
        set(if lowered { TOP_K } else { &[] }, k);
    }
    if let Some(m) = experts {
        let n = config.experts()?;
        if m != n {
            set(EXPERTS, m);
            if let Some(capacity) = config.integer("expert_capacity")? {
                set(&["expert_capacity"], capacity.saturating_mul(n).div_ceil(m.max(1)));
            }
        }
    }
    if let Some(d_ff) = plan.d_ff {
        set(&[width_key(source)?], d_ff);
    }
    match plan.export {
        Export::Native => native(config, plan, &everywhere),
        Export::Stock | Export::Expanded => config.edited(&everywhere, &[]),
    }
}

/// The key that says how wide experts are, and nothing else.
pub(super) fn width_key(source: &Checkpoint) -> Result<&'static str> {
    let config = source.config();
    let width = source.layers().first().map_or(0, |layer| layer.d_ff);
    let count = |key: &str| Ok::<_, crate::Error>(config.integer(key)?.unwrap_or(0));
    let layers =
        count("num_hidden_layers")?.max(count("num_layers")? + count("num_decoder_layers")?);
    let dense = layers > source.layers().len();
    let refuse = |key: &str| {
        mismatch(key, "the size of routed experts alone, to reduce it", "one of other layers too")
    };
    if config.integer("moe_intermediate_size")? == Some(width) {
        let mut shared = 0;
        for key in SHARED {
            shared += count(key)?;
        }
        let key = "moe_intermediate_size";
        return if shared > 0 { Err(refuse(key)) } else { Ok(key) };
    }
    for key in ["intermediate_size", "d_ff"] {
        if config.integer(key)? == Some(width) {
            return if dense { Err(refuse(key)) } else { Ok(key) };
        }
    }
    Err(mismatch("moe_intermediate_size", &format!("{width}, the size of experts"), "nothing"))
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
