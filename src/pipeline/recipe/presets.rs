//! The named recipes: files in TOML, which hold everything but the number of experts that stay.

use crate::error::{ErrorKind, Result};
use crate::pipeline::options::Keep;
use crate::pipeline::recipe::Recipe;

/// A list of names, and the file of each.
macro_rules! presets {
    ($($name:literal),+) => {
        pub(crate) const NAMES: &[&str] = &[$($name),+];

        fn file(name: &str) -> Option<&'static str> {
            match name {
                $($name => Some(include_str!(concat!("presets/", $name, ".toml"))),)+
                _ => None,
            }
        }
    };
}

presets!(
    "fast",
    "balanced",
    "best",
    "m-smoe",
    "mc-smoe",
    "mc-smoe-budget",
    "hc-smoe",
    "reap",
    "ream"
);

/// The preset of everything that names none.
pub(crate) const DEFAULT: &str = "fast";

/// The file of a preset.
pub(crate) fn text(name: &str) -> Result<&'static str> {
    file(name).ok_or_else(|| {
        let reason = format!("no preset `{name}`; there are {}", NAMES.join(", "));
        ErrorKind::Recipe { reason }.into()
    })
}

/// A preset with its number of experts.
pub(crate) fn preset(name: &str, keep: Keep) -> Result<Recipe> {
    Recipe::from_preset(text(name)?, name, keep)
}
