//! The non-linearity of experts and of dense MLPs, by the names that configurations give it.

use super::keys::Keys;
use super::layout::Layout;
use crate::error::{ErrorKind, Result};
use crate::model::Activation;

const SUPPORTED: &str = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu";

/// The function of a name.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for another function.
fn named(name: &str) -> Result<Activation> {
    Ok(match name {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            let (found, supported) = (other.into(), SUPPORTED.into());
            return Err(ErrorKind::Unsupported { what: "activation", found, supported }.into());
        }
    })
}

/// The function that `key` names; SiLU where it is absent.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for another function, [`ErrorKind::Config`] for no string.
pub(crate) fn activation(keys: Keys<'_>, key: &str) -> Result<Activation> {
    named(keys.text(key)?.unwrap_or("silu"))
}

/// The function of routed experts: that of gpt-oss in its layout; else what `hidden_act` or
/// another spelling of it names, by default SiLU with a gate and ReLU without.
///
/// # Errors
/// As [`activation`].
pub(crate) fn expert_activation(keys: Keys<'_>, layout: &Layout) -> Result<Activation> {
    if layout.is_interleaved() {
        let alpha = keys.number("swiglu_alpha")?.unwrap_or(1.702) as f32;
        let limit = keys.number("swiglu_limit")?.unwrap_or(7.0) as f32;
        return Ok(Activation::ClampedSwiglu { alpha, limit });
    }
    for key in ["hidden_act", "dense_act_fn", "hidden_activation", "activation_function"] {
        if let Some(name) = keys.text(key)? {
            return named(name);
        }
    }
    // DBRX names it in an object.
    if let Some(name) = keys.get("ffn_act_fn").and_then(|object| object.get("name")?.as_str()) {
        return named(name);
    }
    Ok(if layout.is_gated() { Activation::Silu } else { Activation::Relu })
}
