//! Families whose layers all have grouped-query attention.

mod dots;
mod ernie;
mod exaone;
mod glm;
mod gpt_oss;
mod minimax;
mod mixtral;
mod olmo;
mod qwen;

use super::Family;

pub(super) const ALL: &[&[Family]] = &[
    mixtral::FAMILIES,
    qwen::FAMILIES,
    olmo::FAMILIES,
    glm::FAMILIES,
    dots::FAMILIES,
    ernie::FAMILIES,
    minimax::FAMILIES,
    gpt_oss::FAMILIES,
    exaone::FAMILIES,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::{Forward, GroupedSpec, Keys, MixerSpec, Pairing, QkNorm};
    use serde_json::{Value, json};

    fn config() -> Value {
        json!({"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
            "max_position_embeddings": 128, "moe_intermediate_size": 16})
    }

    /// The attention of a layer, as the table of the family reads it.
    fn attention(family: &str, config: &Value) -> GroupedSpec {
        let all = ALL.iter().copied().flatten();
        let family = all.clone().find(|f| f.model_types.contains(&family)).unwrap();
        let Forward::Decoder(decoder) = family.forward else { panic!("imported") };
        let mut spec = decoder(Keys::root(config)).unwrap();
        let MixerSpec::Grouped(attention) = spec.mixers.swap_remove(1) else { panic!("latent") };
        attention
    }

    #[test]
    fn biases_and_norms_follow_the_family() {
        let mut config = config();
        config["attention_bias"] = json!(true);
        config["use_qk_norm"] = json!(true);
        let of = |family: &str| {
            let spec = attention(family, &config);
            (spec.qkv_bias, spec.out_bias, spec.qk_norm, spec.rope.unwrap().pairing)
        };
        let halves = Pairing::Halves;
        assert_eq!(of("glm4_moe"), (true, false, QkNorm::PerHead, halves));
        assert_eq!(of("dots1"), (true, true, QkNorm::PerHead, halves));
        assert_eq!(of("minimax_m2"), (false, false, QkNorm::Whole, halves));
        assert_eq!(of("ernie4_5_moe"), (false, false, QkNorm::None, Pairing::Neighbours));
    }

    #[test]
    fn part_of_a_head_is_rotated() {
        let mut config = config();
        let of = |family: &str, config: &Value| attention(family, config).rope.unwrap().dim;
        assert_eq!((of("glm4_moe", &config), of("minimax_m2", &config)), (4, 8));
        config["rotary_dim"] = json!(2);
        assert_eq!((of("minimax_m2", &config), of("dots1", &config)), (2, 8));
    }
}
