//! EXAONE-MoE (K-EXAONE): Qwen3-MoE's attention, DeepSeek-V3's router and shared experts. Layers
//! with a window rotate queries and keys; those without one have no position embedding.

use crate::error::Result;
use crate::families::layout::{FUSED, GATE_UP_DOWN, MLP_ROUTERS};
use crate::families::{
    DecoderSpec, Experts, Family, Forward, GroupedSpec, Keys, Layout, MixerSpec, QkNorm,
    RopeDefaults, Routing, Runtimes, SharedSpec,
};

pub(super) const FAMILIES: &[Family] = &[Family {
    model_types: &["exaone_moe"],
    layouts: &[&EXAONE, &FUSED],
    routing: Routing::deepseek_v3(2.5, (1, 1)),
    forward: Forward::Decoder(decoder),
    runtimes: Runtimes::UNKNOWN,
}];

/// The usual names, but for the correction of the choice.
static EXAONE: Layout = Layout {
    name: "exaone",
    experts: Experts::Each { before: "mlp.experts.", projections: GATE_UP_DOWN },
    router: MLP_ROUTERS,
    router_bias: &[],
    correction: &["mlp.e_score_correction_bias"],
};

fn decoder(keys: Keys<'_>) -> Result<DecoderSpec> {
    let attention = GroupedSpec {
        qk_norm: QkNorm::PerHead,
        ..GroupedSpec::read(keys, RopeDefaults::theta(1e4))?
    };
    let mixer = |(window, rotated)| {
        let rope = attention.rope.clone().filter(|_| rotated);
        MixerSpec::Grouped(GroupedSpec { window, rope, ..attention.clone() })
    };
    let mixers = layers(keys)?.into_iter().map(mixer).collect();
    let shared = SharedSpec::plain(keys, "num_shared_experts", 1)?;
    Ok(DecoderSpec { shared, ..DecoderSpec::read(keys, 1e-5, mixers)? })
}

/// Of each layer its window and whether it rotates: windows as `layer_types` says; else in all but
/// each fourth layer, or as the number `sliding_window_pattern` says.
fn layers(keys: Keys<'_>) -> Result<Vec<(Option<usize>, bool)>> {
    let layers = keys.size("num_hidden_layers")?;
    let Some(window) = keys.optional_size("sliding_window")? else {
        return Ok(vec![(None, true); layers]);
    };
    let with = |windowed: bool| (windowed.then_some(window), windowed);
    if let Some(types) = keys.per_layer("layer_types", layers)? {
        return Ok(types.iter().map(|t| with(*t == "sliding_attention")).collect());
    }
    let pattern = keys.optional_size("sliding_window_pattern")?.unwrap_or(4);
    Ok((1..=layers).map(|layer| with(!layer.is_multiple_of(pattern))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn layers_without_a_window_do_not_rotate_unless_none_has_one() {
        let mut config = json!({"num_hidden_layers": 4, "sliding_window": 5});
        let of = |config: &serde_json::Value| layers(Keys::root(config)).unwrap();
        let (near, far) = ((Some(5), true), (None, false));
        assert_eq!(of(&config), [near, near, near, far]);
        config["layer_types"] =
            json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
        assert_eq!(of(&config), [far, near, far, near]);
        config["sliding_window"] = json!(null);
        assert_eq!(of(&config), [(None, true); 4]);
    }
}
