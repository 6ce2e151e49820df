//! Commands that look at something: checkpoints, targets, presets.

pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod presets;
pub(crate) mod report;
pub(crate) mod verify;
