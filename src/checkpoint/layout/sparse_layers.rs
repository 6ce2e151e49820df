//! Which layers have experts by the config, and whether the tensors agree.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::checkpoint::config::{Config, mismatch};
use crate::error::Result;

/// More layers than any model has: a damaged config may say any number.
const MOST_LAYERS: usize = 1 << 16;

/// Which of `layers` layers are sparse, where keys of the config say so; `None` where none does.
///
/// Keys as transformers 5.24 reads them: `mlp_layer_types` (a list), `first_k_dense_replace` with
/// `moe_layer_freq`, `mlp_only_layers` and `decoder_sparse_step`, `expert_layer_period` and
/// `expert_layer_offset`, `num_dense_layers`, `moe_layers` and `interleave_moe_layer_step`.
///
/// # Errors
/// [`Config`](crate::ErrorKind::Config) for a key of another type.
pub(crate) fn sparse_layers(config: &Config, layers: usize) -> Result<Option<Vec<bool>>> {
    let all = 0..layers;
    let list = |key: &str| config.get(key).and_then(Value::as_array).filter(|l| !l.is_empty());
    if let Some(types) = list("mlp_layer_types").filter(|types| types.len() == layers) {
        return Ok(Some(types.iter().map(|kind| kind == "sparse").collect()));
    }
    if let Some(each) = list("moe_layer_freq").filter(|each| each.len() == layers) {
        return Ok(Some(each.iter().map(|flag| flag.as_u64() == Some(1)).collect()));
    }
    if let Some(dense) = config.integer("first_k_dense_replace")? {
        let step = match config.get("moe_layer_freq") {
            Some(step) if step.is_u64() => step.as_u64().unwrap_or(1) as usize,
            _ => 1,
        };
        return Ok(Some(all.map(|i| i >= dense && i.is_multiple_of(step.max(1))).collect()));
    }
    if let Some(step) = config.integer("decoder_sparse_step")?
        && config.get("decoder_layers").is_none()
        && config.get("num_decoder_layers").is_none()
    {
        let dense: BTreeSet<u64> =
            list("mlp_only_layers").into_iter().flatten().filter_map(Value::as_u64).collect();
        let sparse =
            |i: usize| !dense.contains(&(i as u64)) && step > 0 && (i + 1).is_multiple_of(step);
        return Ok(Some(all.map(sparse).collect()));
    }
    if let (Some(period), Some(offset)) =
        (config.integer("expert_layer_period")?, config.integer("expert_layer_offset")?)
    {
        return Ok(Some(all.map(|i| period > 0 && i % period == offset).collect()));
    }
    if let Some(dense) = config.integer("num_dense_layers")? {
        return Ok(Some(all.map(|i| i >= dense).collect()));
    }
    if let Some(sparse) = list("moe_layers") {
        let sparse: BTreeSet<u64> = sparse.iter().filter_map(Value::as_u64).collect();
        return Ok(Some(all.map(|i| sparse.contains(&(i as u64))).collect()));
    }
    if let Some(step) = config.integer("interleave_moe_layer_step")?.filter(|step| *step > 0) {
        return Ok(Some(all.map(|i| (i + 1).is_multiple_of(step)).collect()));
    }
    Ok(None)
}

/// Compares the sparse layers of the config with those `found`, and looks for experts that no
/// layout knows in the layers that were not. `others`: of each such layer the names and shapes of
/// its tensors, the names without the layer's prefix.
///
/// # Errors
/// [`Config`](crate::ErrorKind::Config), naming all layers.
pub(super) fn check_sparse_layers(
    config: &Config,
    layers: usize,
    found: &BTreeSet<usize>,
    others: &BTreeMap<usize, Vec<(&str, &[usize])>>,
) -> Result<()> {
    let experts = config.experts().ok();
    let mut unrecognised = Vec::new();
    for (layer, tensors) in others {
        let sparse = tensors.iter().find(|(name, shape)| looks_sparse(name, shape, experts));
        unrecognised.extend(sparse.map(|(name, _)| format!("layer {layer} ({name})")));
    }
    if !unrecognised.is_empty() {
        let found = format!("tensors that no layout knows in {}", unrecognised.join(", "));
        return Err(mismatch("experts of every MoE layer", "a layout that is known", found));
    }
    if layers > MOST_LAYERS {
        return Err(mismatch("num_hidden_layers", &format!("at most {MOST_LAYERS}"), layers));
    }
    let Some(expected) = sparse_layers(config, layers)? else { return Ok(()) };
    let differ = |sparse: bool| {
        let wrong = (0..layers).filter(|i| expected[*i] == sparse && found.contains(i) != sparse);
        wrong.map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
    };
    let (lacking, extra) = (differ(true), differ(false));
    if !lacking.is_empty() {
        let found = format!("none in layer {lacking}");
        return Err(mismatch("experts of every MoE layer", "as the config says", found));
    }
    if !extra.is_empty() {
        let found = format!("experts in layer {extra}, which the config calls dense");
        return Err(mismatch("experts of every MoE layer", "as the config says", found));
    }
    Ok(())
}

/// Whether a tensor of a layer without known experts belongs to experts or a router all the same:
/// by a name, or because a side or a number in its name counts the experts.
fn looks_sparse(name: &str, shape: &[usize], experts: Option<usize>) -> bool {
    let named = name.split('.').any(|part| {
        part.contains("expert") && !part.contains("shared") || part == "router" || part == "moe"
    });
    let stacked = shape.len() == 3 && experts.is_some_and(|n| n > 1 && shape[0] == n);
    let routes = shape.len() == 2
        && experts.is_some_and(|n| n > 1 && shape[0] == n)
        && name.ends_with("gate.weight");
    named || stacked || routes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(keys: &str) -> Option<Vec<usize>> {
        let config = Config::parse(keys.into()).unwrap();
        let flags = sparse_layers(&config, 6).unwrap()?;
        Some((0..6).filter(|i| flags[*i]).collect())
    }

    #[test]
    fn keys_say_which_layers_are_sparse() {
        assert_eq!(sparse("{}"), None);
        assert_eq!(sparse(r#"{"first_k_dense_replace": 2}"#), Some(vec![2, 3, 4, 5]));
        let every_second = r#"{"first_k_dense_replace": 1, "moe_layer_freq": 2}"#;
        assert_eq!(sparse(every_second), Some(vec![2, 4]));
        let step = r#"{"decoder_sparse_step": 2, "mlp_only_layers": [3]}"#;
        assert_eq!(sparse(step), Some(vec![1, 5]));
        let jamba = r#"{"expert_layer_period": 2, "expert_layer_offset": 1}"#;
        assert_eq!(sparse(jamba), Some(vec![1, 3, 5]));
        assert_eq!(sparse(r#"{"num_dense_layers": 4}"#), Some(vec![4, 5]));
        assert_eq!(sparse(r#"{"interleave_moe_layer_step": 3}"#), Some(vec![2, 5]));
        assert_eq!(sparse(r#"{"moe_layers": [0, 5]}"#), Some(vec![0, 5]));
    }

    #[test]
    fn experts_of_another_spelling_are_seen() {
        for (name, shape) in [
            ("mlp.expert_bank.0.up_proj.weight", &[4, 2][..]),
            ("moe.ffns.3.up_proj.weight", &[4, 2]),
            ("ffn.bank", &[8, 4, 2]),
            ("block.gate.weight", &[8, 4]),
        ] {
            assert!(looks_sparse(name, shape, Some(8)), "{name}");
        }
        for (name, shape) in [
            ("mlp.gate_proj.weight", &[8, 4][..]),
            ("mamba.conv1d.weight", &[64, 1, 4]),
            ("mlp.shared_experts.up_proj.weight", &[4, 2]),
        ] {
            assert!(!looks_sparse(name, shape, Some(8)), "{name}");
        }
    }
}
