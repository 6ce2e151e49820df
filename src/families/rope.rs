//! Rotary position embedding and its scalings: default, linear, dynamic NTK, YaRN, Llama 3.
//!
//! Frequencies are rounded to `f32` at the same steps as in the reference classes, because their
//! error is multiplied by the position.

use std::f64::consts::PI;

use super::keys::Keys;
use crate::error::{Error, ErrorKind, Result};

/// How the frequencies of a longer context follow from the trained ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scaling {
    /// `θ^(−2j/D)`.
    Default,
    /// Divided by `factor`.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the length of the window beyond the trained one (NTK-aware).
    Dynamic {
        /// The factor.
        factor: f64,
    },
    /// High frequencies kept, low ones divided, a ramp between (YaRN, arXiv 2309.00071).
    Yarn {
        /// The factor of the low frequencies.
        factor: f64,
        /// Dimension pair below which nothing is divided.
        low: f64,
        /// Dimension pair above which everything is divided.
        high: f64,
        /// Factor on cosine and sine.
        attention_factor: f32,
    },
    /// As YaRN, but by wavelength (Llama 3.1).
    Llama3 {
        /// The factor of the low frequencies.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// The trained context.
        original: f64,
    },
}

/// Which two dimensions form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairing {
    /// `(j, j + D/2)`, "rotate half".
    Halves,
    /// `(2j, 2j + 1)`.
    Neighbours,
}

/// What a family's class takes where `config.json` says nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RopeDefaults {
    /// The base `θ`.
    pub(crate) theta: f64,
    /// The rotated part of a head.
    pub(crate) part: f64,
    /// How rotated dimensions pair up; no key says that.
    pub(crate) pairing: Pairing,
}

impl RopeDefaults {
    /// Whole heads, in halves.
    pub(crate) const fn theta(theta: f64) -> Self {
        Self { theta, part: 1.0, pairing: Pairing::Halves }
    }
}

/// Rotary embedding of the first `dim` of each head's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rope {
    /// Number of rotated dimensions, even.
    pub(crate) dim: usize,
    /// How they pair up.
    pub(crate) pairing: Pairing,
    /// The base `θ`.
    pub(crate) theta: f64,
    /// The scaling.
    pub(crate) scaling: Scaling,
    /// `max_position_embeddings`.
    pub(crate) max_positions: usize,
    /// Factor on attention scores that YaRN asks of latent attention (`mscale_all_dim`, squared).
    pub(crate) score_factor: f32,
}

/// YaRN's temperature `0.1 m ln(s) + 1`.
fn temperature(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) for
    /// heads of `head_dim`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a missing or ill-typed key, [`ErrorKind::Unsupported`] for another
    /// scaling.
    pub(crate) fn parse(keys: Keys<'_>, head_dim: usize, defaults: RopeDefaults) -> Result<Self> {
        let max_positions = keys.size("max_position_embeddings")?;
        let nested = match keys.inner("rope_parameters")? {
            Some(nested) => nested,
            None => keys.inner("rope_scaling")?.unwrap_or(keys),
        };
        let in_either = |key| Ok::<_, Error>(nested.number(key)?.or(keys.number(key)?));
        let theta = in_either("rope_theta")?.unwrap_or(defaults.theta);
        if theta <= 1.0 {
            return Err(keys.wrong("rope_theta", "more than 1", theta));
        }
        let part = in_either("partial_rotary_factor")?.unwrap_or(defaults.part);
        let dim = (head_dim as f64 * part) as usize;
        if dim < 2 || dim > head_dim || !dim.is_multiple_of(2) {
            let expected = "an even number of rotated dimensions within the head";
            return Err(keys.wrong("partial_rotary_factor", expected, dim));
        }
        let kind = nested.text("rope_type")?.or(nested.text("type")?).unwrap_or("default");
        let (pairing, scaling) = (defaults.pairing, Scaling::Default);
        let mut rope = Self { dim, pairing, theta, scaling, max_positions, score_factor: 1.0 };
        rope.scaling = rope.parse_scaling(kind, keys, nested)?;
        if kind != "default"
            && let Some(m) = nested.number("mscale_all_dim")?.filter(|&m| m != 0.0)
        {
            let t = temperature(nested.need_number("factor")?, m);
            rope.score_factor = (t * t) as f32;
        }
        Ok(rope)
    }

    fn parse_scaling(&self, kind: &str, keys: Keys<'_>, nested: Keys<'_>) -> Result<Scaling> {
        let original = || -> Result<f64> {
            let key = "original_max_position_embeddings";
            let own = nested.number(key)?.or(keys.number(key)?);
            Ok(own.unwrap_or(self.max_positions as f64))
        };
        let factor = || match nested.need_number("factor") {
            Ok(factor) if factor <= 0.0 => Err(nested.wrong("factor", "more than 0", factor)),
            factor => factor,
        };
        Ok(match kind {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: factor()? },
            "dynamic" => Scaling::Dynamic { factor: factor()? },
            "yarn" => self.parse_yarn(nested, original()?)?,
            "llama3" => Scaling::Llama3 {
                factor: factor()?,
                low: nested.need_number("low_freq_factor")?,
                high: nested.need_number("high_freq_factor")?,
                original: original()?,
            },
            other => {
                let supported = "default, linear, dynamic, yarn, llama3".into();
                let (what, found) = ("rope scaling", other.into());
                return Err(ErrorKind::Unsupported { what, found, supported }.into());
            }
        })
    }

    fn parse_yarn(&self, nested: Keys<'_>, original: f64) -> Result<Scaling> {
        let factor = match nested.number("factor")? {
            Some(factor) => factor,
            None => self.max_positions as f64 / original,
        };
        let non_zero = |key| Ok::<_, Error>(nested.number(key)?.filter(|&x| x != 0.0));
        let attention = match (non_zero("mscale")?, non_zero("mscale_all_dim")?) {
            (Some(m), Some(all)) => temperature(factor, m) / temperature(factor, all),
            _ => temperature(factor, 1.0),
        };
        let attention = nested.number("attention_factor")?.unwrap_or(attention);
        // The dimension pair that turns this often over the trained context.
        let pair = |turns: f64| {
            self.dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let low = pair(non_zero("beta_fast")?.unwrap_or(32.0));
        let high = pair(non_zero("beta_slow")?.unwrap_or(1.0));
        let whole = nested.flag("truncate", true)?;
        let (low, high) = if whole { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
        Ok(Scaling::Yarn { factor, low, high, attention_factor: attention as f32 })
    }

    /// Most tokens that a window may hold. Dynamic scaling exists to go beyond the trained length.
    pub(crate) fn longest_window(&self) -> usize {
        match self.scaling {
            Scaling::Dynamic { factor } => (self.max_positions as f64 * factor.max(1.0)) as usize,
            _ => self.max_positions,
        }
    }

    /// The angular frequencies of a window of `len` tokens: `(dim / 2)`.
    pub(crate) fn frequencies(&self, len: usize) -> Vec<f32> {
        let dim = self.dim as f64;
        let base = match self.scaling {
            Scaling::Dynamic { factor } => {
                let stretch = len.max(self.max_positions) as f64 / self.max_positions as f64;
                let grown = factor * stretch - (factor - 1.0);
                // With two rotated dimensions the only frequency is 1 for every base.
                if dim > 2.0 { self.theta * grown.powf(dim / (dim - 2.0)) } else { self.theta }
            }
            _ => self.theta,
        };
        let period = |j: usize| {
            let exponent = (2 * j) as f32 / self.dim as f32;
            f64::from(base as f32).powf(f64::from(exponent)) as f32
        };
        (0..self.dim / 2).map(|j| self.scale(j, period(j))).collect()
    }

    fn scale(&self, j: usize, period: f32) -> f32 {
        let own = 1.0 / period;
        match self.scaling {
            Scaling::Default | Scaling::Dynamic { .. } => own,
            Scaling::Linear { factor } => own / factor as f32,
            Scaling::Yarn { factor, low, high, .. } => {
                let high = if low == high { high + 0.001 } else { high };
                let ramp = ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                1.0 / (factor as f32 * period) * (1.0 - keep) + own * keep
            }
            Scaling::Llama3 { factor, low, high, original } => {
                let wave = (2.0 * PI) as f32 / own;
                let (factor, original) = (factor as f32, original as f32);
                let (low, high) = (low as f32, high as f32);
                if wave < original / high {
                    own
                } else if wave > original / low {
                    own / factor
                } else {
                    let smooth = (original / wave - low) / (high - low);
                    (1.0 - smooth) * own / factor + smooth * own
                }
            }
        }
    }

    /// Factor on cosine and sine.
    pub(crate) fn amplitude(&self) -> f32 {
        match self.scaling {
            Scaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rope(config: serde_json::Value) -> Result<Rope> {
        let mut config = config;
        config["max_position_embeddings"] = json!(64);
        Rope::parse(Keys::root(&config), 8, RopeDefaults::theta(1e4))
    }

    #[test]
    fn both_spellings_agree() {
        let old = rope(json!({"rope_theta": 500.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0,
            "mscale": 1.0, "mscale_all_dim": 0.7}}));
        let new = rope(json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0,
            "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7}}));
        let (old, new) = (old.unwrap(), new.unwrap());
        assert_eq!(old, new);
        let t = 0.1 * 0.7 * 4.0f64.ln() + 1.0;
        assert_eq!(old.score_factor, (t * t) as f32);
    }

    #[test]
    fn scalings_divide_what_they_should() {
        let default = rope(json!({})).unwrap().frequencies(10);
        assert_eq!(default[0], 1.0);
        approx::assert_relative_eq!(default[3], 1e-3, max_relative = 1e-6);
        let linear = rope(json!({"rope_scaling": {"type": "linear", "factor": 4}})).unwrap();
        assert_eq!(linear.frequencies(10)[1], default[1] / 4.0);
        let dynamic = rope(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})).unwrap();
        assert_eq!(dynamic.frequencies(64), default);
        assert!(dynamic.frequencies(128)[3] < default[3]);
        assert_eq!(dynamic.longest_window(), 128);
        let llama = rope(json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}));
        let llama = llama.unwrap().frequencies(10);
        assert_eq!((llama[0], llama[3]), (default[0], default[3] / 8.0));
    }

    #[test]
    fn partial_rotation_and_errors() {
        assert_eq!(rope(json!({"partial_rotary_factor": 0.5})).unwrap().dim, 4);
        assert!(rope(json!({"partial_rotary_factor": 0.1})).is_err());
        let error = rope(json!({"rope_scaling": {"type": "longrope"}})).unwrap_err();
        assert!(error.to_string().contains("default, linear, dynamic, yarn, llama3"));
        let error = rope(json!({"rope_scaling": {"type": "linear"}})).unwrap_err();
        assert!(error.to_string().contains("`rope_scaling.factor`"));
    }
}
