//! What is particular about each model family: one table a family, which checkpoint, forward pass
//! and plan read.
//!
//! A [`Family`] says which names its expert tensors have, how its router chooses and weighs, what
//! its layers compute (if the forward pass knows that), and which runtimes load it. Everything else
//! in the crate is the same for all of them. The tables lie in folders by the kind of attention;
//! `imported` holds those without a native forward pass, whose statistics come from elsewhere.

mod activation;
mod decoder;
mod encoder_decoder;
mod grouped;
mod hybrid;
mod imported;
mod keys;
mod latent;
mod layout;
mod rope;
mod routing;

use serde_json::Value;

pub(crate) use activation::{activation, expert_activation};
pub(crate) use decoder::{
    DecoderSpec, DeltaNetSpec, GroupedSpec, LatentSpec, MixerSpec, NormKind, NormSpec, QkNorm,
    SharedSpec,
};
pub(crate) use encoder_decoder::SwitchSpec;
pub(crate) use keys::Keys;
pub(crate) use layout::{Experts, Layout};
pub(crate) use rope::{Pairing, Rope, RopeDefaults};
pub(crate) use routing::Routing;

use crate::error::{ErrorKind, Result};
use crate::model::RoutingRule;

/// One model family, or several that differ in nothing that matters here.
#[derive(Debug)]
pub(crate) struct Family {
    /// The values of `model_type` in `config.json`.
    pub(crate) model_types: &'static [&'static str],
    /// How its known releases name and shape the tensors of experts and routers.
    pub(crate) layouts: &'static [&'static Layout],
    /// How its router chooses experts and weighs them.
    pub(crate) routing: Routing,
    /// Its forward pass.
    pub(crate) forward: Forward,
    /// Which other programs load its stock export.
    pub(crate) runtimes: Runtimes,
}

/// How the specification of a family's forward pass is read from `config.json`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Forward {
    /// A decoder-only model.
    Decoder(fn(Keys<'_>) -> Result<DecoderSpec>),
    /// An encoder-decoder model.
    EncoderDecoder(fn(Keys<'_>) -> Result<SwitchSpec>),
    /// There is none: statistics come from elsewhere.
    Imported,
}

/// Which other programs load a family. Read in their sources, not tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Runtimes {
    /// vLLM (its `registry.py`).
    pub(crate) vllm: Support,
    /// llama.cpp (its `conversion/__init__.py`).
    pub(crate) llama_cpp: Support,
    /// Whether the code in a native folder computes what the family computes.
    pub(crate) native_folder: bool,
}

/// Whether a program loads a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Support {
    /// It does.
    Loads,
    /// It has no place for such a model.
    Refuses,
    /// It is not in our list.
    Unknown,
}

impl Runtimes {
    /// Both vLLM and llama.cpp load it.
    pub(crate) const BOTH: Self =
        Self { vllm: Support::Loads, llama_cpp: Support::Loads, native_folder: true };
    /// Neither is known to.
    pub(crate) const UNKNOWN: Self =
        Self { vllm: Support::Unknown, llama_cpp: Support::Unknown, native_folder: true };
    /// Neither has encoder-decoder models with experts.
    pub(crate) const NEITHER: Self =
        Self { vllm: Support::Refuses, llama_cpp: Support::Refuses, native_folder: true };
}

/// Objects of `config.json` whose keys count as the model's: a wrapper's language model, and the
/// blocks of DBRX.
pub(crate) const WITHIN: [&str; 2] = ["text_config", "ffn_config"];

/// Every family.
pub(crate) fn all() -> impl Iterator<Item = &'static Family> {
    let folders = [grouped::ALL, latent::ALL, hybrid::ALL, encoder_decoder::ALL, imported::ALL];
    folders.into_iter().flatten().flat_map(|tables| tables.iter())
}

/// The routing rule of a family; one that is in no table routes as its keys suggest. `top_k`: what
/// the configuration says, asked only where the family's code does not fix it.
///
/// # Errors
/// [`ErrorKind::Config`] for a missing or mistyped key.
pub(crate) fn routing_rule(
    model_type: &str,
    keys: Keys<'_>,
    corrected: bool,
    top_k: impl FnOnce() -> Result<usize>,
) -> Result<RoutingRule> {
    let routing = match find(model_type) {
        Some(family) => family.routing,
        None => Routing::suggested(keys, corrected)?,
    };
    let top_k = routing.fixed_top_k.map_or_else(top_k, Ok)?;
    routing.rule(keys, top_k)
}

/// The family of a `model_type`, if it is in a table.
pub(crate) fn find(model_type: &str) -> Option<&'static Family> {
    all().find(|family| family.model_types.contains(&model_type))
}

/// The layouts in which experts of a model are looked for, in this order: those of its family, the
/// ones that families share, then other families' own.
pub(crate) fn layouts(model_type: &str) -> Vec<&'static Layout> {
    let own = find(model_type).map_or(&[][..], |family| family.layouts);
    let mut found: Vec<&'static Layout> = Vec::new();
    for layout in own.iter().chain(layout::SHARED).chain(all().flat_map(|f| f.layouts)) {
        if !found.iter().any(|known| std::ptr::eq(*known, *layout)) {
            found.push(layout);
        }
    }
    found
}

/// The forward pass of the family that a configuration names.
///
/// # Errors
/// [`ErrorKind::Config`] without `model_type`, [`ErrorKind::Unsupported`] for a family without a
/// native forward pass.
pub(crate) fn forward(config: &Value) -> Result<Forward> {
    let keys = Keys::root(config);
    let Some(name) = keys.text("model_type")? else {
        return Err(keys.wrong("model_type", "a model family", "nothing"));
    };
    match find(name).map(|family| family.forward) {
        Some(forward @ (Forward::Decoder(_) | Forward::EncoderDecoder(_))) => Ok(forward),
        Some(Forward::Imported) | None => {
            let supported = format!(
                "{} (any other family can be merged with statistics that were collected elsewhere)",
                native(|forward| !matches!(forward, Forward::Imported))
            );
            let (what, found) = ("model family for a native forward pass", name.into());
            Err(ErrorKind::Unsupported { what, found, supported }.into())
        }
    }
}

/// The specification of a decoder-only model.
///
/// # Errors
/// Those of [`forward`]; [`ErrorKind::Unsupported`] for an encoder-decoder model, an activation or
/// a position scaling that is not implemented; [`ErrorKind::Config`] for a missing, ill-typed or
/// contradictory key.
pub(crate) fn decoder(config: &Value) -> Result<DecoderSpec> {
    match forward(config)? {
        Forward::Decoder(read) => read(Keys::root(config)),
        _ => Err(other_kind(config, "decoder-only family", |f| matches!(f, Forward::Decoder(_)))),
    }
}

/// The specification of an encoder-decoder model.
///
/// # Errors
/// As [`decoder`], with the kinds exchanged.
pub(crate) fn encoder_decoder(config: &Value) -> Result<SwitchSpec> {
    match forward(config)? {
        Forward::EncoderDecoder(read) => read(Keys::root(config)),
        _ => Err(other_kind(config, "encoder-decoder family", |f| {
            matches!(f, Forward::EncoderDecoder(_))
        })),
    }
}

fn other_kind(
    config: &Value,
    what: &'static str,
    wanted: fn(Forward) -> bool,
) -> crate::error::Error {
    let found = config["model_type"].as_str().unwrap_or_default().into();
    ErrorKind::Unsupported { what, found, supported: native(wanted) }.into()
}

/// The model types whose forward pass is of a kind, in words.
fn native(wanted: fn(Forward) -> bool) -> String {
    let families = all().filter(|family| wanted(family.forward));
    families.flat_map(|family| family.model_types).copied().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_model_type_is_in_one_table() {
        let names: Vec<&str> = all().flat_map(|f| f.model_types).copied().collect();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} is in two tables");
        }
        assert!(all().all(|family| !family.layouts.is_empty()));
    }

    #[test]
    fn unknown_families_are_told_what_is_possible() {
        for name in ["gpt2", "dbrx"] {
            let error = decoder(&json!({"model_type": name})).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("olmoe"), "{error}");
            assert!(error.contains("statistics that were collected elsewhere"), "{error}");
        }
        assert!(matches!(forward(&json!({})).unwrap_err().kind(), ErrorKind::Config { .. }));
        let error = decoder(&json!({"model_type": "switch_transformers"})).unwrap_err();
        assert!(error.to_string().contains("decoder-only family"), "{error}");
    }
}
