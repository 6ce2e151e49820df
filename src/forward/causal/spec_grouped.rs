//! Grouped-query attention as `config.json` describes it, and what it leaves to the family.

use serde_json::Value;

use super::spec::{GroupedSpec, QkNorm};
use crate::error::Result;
use crate::forward::attention::rotation::Pairing;
use crate::forward::family::Family;
use crate::forward::keys::Keys;

pub(crate) fn parse(family: Family, keys: Keys<'_>) -> Result<GroupedSpec> {
    let heads = keys.size("num_attention_heads")?;
    let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads {heads}");
        return Err(keys.wrong("num_key_value_heads", &expected, kv_heads));
    }
    let head_dim = match keys.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None => keys.size("hidden_size")? / heads,
    };
    let bare = matches!(family, Family::Mixtral | Family::Ernie45Moe | Family::MinimaxM2);
    let bias = !bare && keys.flag("attention_bias", false)?;
    let clip = keys.number("clip_qkv")?.filter(|_| family == Family::Olmoe);
    Ok(GroupedSpec {
        heads,
        kv_heads,
        head_dim,
        qk_norm: match family {
            Family::Qwen3Moe | Family::Dots1 => QkNorm::PerHead,
            Family::Glm4Moe if keys.flag("use_qk_norm", false)? => QkNorm::PerHead,
            Family::Olmoe | Family::MinimaxM2 => QkNorm::Whole,
            _ => QkNorm::None,
        },
        qkv_bias: if family == Family::Qwen2Moe { keys.flag("qkv_bias", true)? } else { bias },
        out_bias: !matches!(family, Family::Qwen2Moe | Family::Glm4Moe) && bias,
        clip: clip.map(|clip| clip as f32),
        windows: windows(family, keys)?,
        pairing: match family {
            Family::Ernie45Moe => Pairing::Neighbours,
            _ => Pairing::Halves,
        },
    })
}

/// The part of a head that is rotated where no `partial_rotary_factor` says so.
pub(crate) fn rotated_part(family: Family, keys: Keys<'_>, d_rotated: usize) -> Result<f64> {
    Ok(match family {
        Family::Glm4Moe => 0.5,
        Family::MinimaxM2 => match keys.optional_size("rotary_dim")? {
            Some(dim) => dim as f64 / d_rotated as f64,
            None => 1.0,
        },
        _ => 1.0,
    })
}

/// Which layers see only the last tokens, and how many.
fn windows(family: Family, keys: Keys<'_>) -> Result<Vec<Option<usize>>> {
    let layers = keys.size("num_hidden_layers")?;
    let used = match family {
        Family::Mixtral | Family::Dots1 => true,
        Family::Qwen2Moe | Family::Qwen3Moe => keys.flag("use_sliding_window", false)?,
        _ => false,
    };
    let window = if used { keys.optional_size("sliding_window")? } else { None };
    if !matches!(family, Family::Qwen2Moe | Family::Dots1) {
        return Ok(vec![window; layers]);
    }
    if let Some(types) = keys.get("layer_types") {
        let list: Option<Vec<&str>> =
            types.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        let Some(list) = list.filter(|list| list.len() == layers) else {
            return Err(keys.wrong("layer_types", "one name per layer", types));
        };
        return Ok(list.iter().map(|t| window.filter(|_| *t == "sliding_attention")).collect());
    }
    // The defaults of the reference configurations.
    let most = keys.count("max_window_layers")?;
    if family == Family::Dots1 {
        let from = most.unwrap_or(62);
        return Ok((0..layers).map(|i| window.filter(|_| i >= from)).collect());
    }
    let below = most.unwrap_or(28);
    Ok((0..layers).map(|i| window.filter(|_| i % 2 == 0 && i < below)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(family: &str) -> Value {
        json!({"model_type": family, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    }

    #[test]
    fn biases_and_norms_follow_the_family() {
        let of = |family: Family, name: &str| {
            let mut config = config(name);
            config["attention_bias"] = json!(true);
            config["use_qk_norm"] = json!(true);
            let spec = parse(family, Keys::root(&config)).unwrap();
            (spec.qkv_bias, spec.out_bias, spec.qk_norm, spec.pairing)
        };
        let halves = Pairing::Halves;
        let glm = of(Family::Glm4Moe, "glm4_moe");
        assert_eq!(glm, (true, false, QkNorm::PerHead, halves));
        assert_eq!(of(Family::Dots1, "dots1"), (true, true, QkNorm::PerHead, halves));
        let minimax = of(Family::MinimaxM2, "minimax_m2");
        assert_eq!(minimax, (false, false, QkNorm::Whole, halves));
        let ernie = of(Family::Ernie45Moe, "ernie4_5_moe");
        assert_eq!(ernie, (false, false, QkNorm::None, Pairing::Neighbours));
    }

    #[test]
    fn dots_looks_back_from_a_layer_on_unless_each_says() {
        let mut config = config("dots1");
        config["sliding_window"] = json!(5);
        config["max_window_layers"] = json!(1);
        let of = |config: &Value| windows(Family::Dots1, Keys::root(config)).unwrap();
        assert_eq!(of(&config), [None, Some(5), Some(5)]);
        let each = ["sliding_attention", "full_attention", "full_attention"];
        config["layer_types"] = json!(each);
        assert_eq!(of(&config), [Some(5), None, None]);
    }

    #[test]
    fn part_of_a_head_is_rotated() {
        let mut config = config("minimax_m2");
        let of = |family, config: &Value| rotated_part(family, Keys::root(config), 8).unwrap();
        assert_eq!((of(Family::Glm4Moe, &config), of(Family::MinimaxM2, &config)), (0.5, 1.0));
        config["rotary_dim"] = json!(2);
        assert_eq!((of(Family::MinimaxM2, &config), of(Family::Dots1, &config)), (0.25, 1.0));
    }
}
