//! Commands that write something, or plan to: statistics, targets.

pub(crate) mod assemble;
pub(crate) mod calibrate;
pub(crate) mod compress;
pub(crate) mod convert_stats;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod write_text;
